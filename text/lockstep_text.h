/* C ABI of the Rust crate lockstep_text: tokenizers and chat templates.
 *
 * Texts are UTF-8 with a length; none is NUL-terminated. Every call that can fail returns an
 * lst_status and, unless that is LST_OK, leaves a message in `error`, which the caller frees with
 * lst_buffer_free, as it does other buffers it is given. No call prints, exits or lets a panic out.
 * A tokenizer or template may be used from many threads at once; a detokenizer from one.
 */
#ifndef LOCKSTEP_TEXT_H_
#define LOCKSTEP_TEXT_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum lst_status {
  LST_OK = 0,
  LST_INVALID_ARGUMENT = 1,
  LST_FORMAT = 2,
  LST_UNSUPPORTED = 3,
  LST_INTERNAL = 4, /* a panic was caught */
} lst_status;

/* A text that the caller owns; size 0 where there is none. */
typedef struct lst_text {
  const char* data;
  size_t size;
} lst_text;

/* Bytes that this library owns. Start with all zero. */
typedef struct lst_buffer {
  char* data;
  size_t size;
  size_t capacity;
} lst_buffer;

/* Ids that this library owns. Start with all zero. */
typedef struct lst_ids {
  int32_t* data;
  size_t size;
  size_t capacity;
} lst_ids;

void lst_buffer_free(lst_buffer* buffer);
void lst_ids_free(lst_ids* ids);

typedef struct lst_tokenizer lst_tokenizer;
typedef struct lst_detokenizer lst_detokenizer;
typedef struct lst_template lst_template;

/* Metadata of a GGUF, by the names of its keys. Ids: -1 where absent; flags: -1 absent, 0, 1. */
typedef struct lst_gguf_vocab {
  lst_text model;
  lst_text pre;
  const lst_text* tokens;
  size_t token_count;
  const float* scores;
  size_t score_count;
  const int32_t* types;
  size_t type_count;
  const lst_text* merges;
  size_t merge_count;
  int32_t bos, eos, unk, pad;
  int8_t add_bos, add_eos, add_space_prefix;
  lst_text chat_template;
  lst_text tool_use_template;
} lst_gguf_vocab;

/* What a tokenizer is; ids are -1 where there is none. */
typedef struct lst_info {
  int32_t vocab_size; /* one more than the largest id */
  int32_t bos, eos, unk, pad;
  int8_t adds_bos, adds_eos; /* whether lst_encode does, with add_special */
} lst_info;

/* tokenizer.json, and the texts of tokenizer_config.json, chat_template.jinja and
 * chat_template.json beside it. */
lst_status lst_tokenizer_from_json(lst_text tokenizer_json, lst_text tokenizer_config,
                                   lst_text chat_template_jinja, lst_text chat_template_json,
                                   lst_tokenizer** out, lst_buffer* error);
lst_status lst_tokenizer_from_gguf(const lst_gguf_vocab* vocab, lst_tokenizer** out, lst_buffer* error);
void lst_tokenizer_free(lst_tokenizer* tokenizer);

lst_info lst_tokenizer_info(const lst_tokenizer* tokenizer);
/* The source of the default chat template, empty if there is none. Lives as long as `tokenizer`. */
lst_text lst_tokenizer_template(const lst_tokenizer* tokenizer);
/* -1 if there is no such token. */
int32_t lst_token_to_id(const lst_tokenizer* tokenizer, lst_text token);
/* False if there is no such id. */
int lst_id_to_token(const lst_tokenizer* tokenizer, int32_t id, lst_buffer* out);
int lst_is_special(const lst_tokenizer* tokenizer, int32_t id);

lst_status lst_encode(const lst_tokenizer* tokenizer, lst_text text, int add_special, int parse_special,
                      lst_ids* out, lst_buffer* error);
lst_status lst_decode(const lst_tokenizer* tokenizer, const int32_t* ids, size_t count, int skip_special,
                      lst_buffer* out, lst_buffer* error);

/* Keeps the tokenizer alive. */
lst_detokenizer* lst_detokenizer_new(const lst_tokenizer* tokenizer, int skip_special);
void lst_detokenizer_free(lst_detokenizer* detokenizer);
lst_status lst_detokenizer_push(lst_detokenizer* detokenizer, int32_t id, lst_buffer* out, lst_buffer* error);
lst_status lst_detokenizer_finish(lst_detokenizer* detokenizer, lst_buffer* out, lst_buffer* error);

/* Empty texts for bos_token or eos_token leave the variable undefined. */
lst_status lst_template_new(lst_text source, lst_text bos_token, lst_text eos_token, lst_template** out,
                            lst_buffer* error);
/* The templates and special tokens that came with the tokenizer; LST_INVALID_ARGUMENT if it has
 * no template. */
lst_status lst_template_from_tokenizer(const lst_tokenizer* tokenizer, lst_template** out, lst_buffer* error);
void lst_template_free(lst_template* chat_template);
/* `messages` and `tools` are JSON arrays, `variables` is a JSON object; the latter two may be
 * empty. */
lst_status lst_template_render(const lst_template* chat_template, lst_text messages, lst_text tools,
                               lst_text variables, int add_generation_prompt, lst_buffer* out,
                               lst_buffer* error);

#ifdef __cplusplus
}
#endif

#endif /* LOCKSTEP_TEXT_H_ */
