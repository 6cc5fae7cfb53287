//! The C ABI. Declarations and rules: lockstep_text.h.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Once};

use crate::detokenizer::Detokenizer;
use crate::error::{Code, Error, Result};
use crate::gguf::{self, Metadata};
use crate::hf::{self, Neighbours};
use crate::template::{ChatTemplate, Request};
use crate::tokenizer::{Templates, Tokenizer};

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Text {
    data: *const u8,
    size: usize,
}

/// A Vec taken apart: `lst_buffer` and `lst_ids`.
#[repr(C)]
pub struct Owned<T> {
    data: *mut T,
    size: usize,
    capacity: usize,
}

#[repr(C)]
pub struct GgufVocab {
    model: Text,
    pre: Text,
    tokens: *const Text,
    token_count: usize,
    scores: *const f32,
    score_count: usize,
    types: *const i32,
    type_count: usize,
    merges: *const Text,
    merge_count: usize,
    bos: i32,
    eos: i32,
    unk: i32,
    pad: i32,
    add_bos: i8,
    add_eos: i8,
    add_space_prefix: i8,
    chat_template: Text,
    tool_use_template: Text,
}

#[repr(C)]
pub struct Info {
    vocab_size: i32,
    bos: i32,
    eos: i32,
    unk: i32,
    pad: i32,
    adds_bos: i8,
    adds_eos: i8,
}

/// What `lst_tokenizer` points to.
pub struct Handle(Arc<Tokenizer>);

/// What `lst_detokenizer` points to.
pub struct Stream {
    tokenizer: Arc<Tokenizer>,
    state: Detokenizer,
}

impl<T> Owned<T> {
    fn set(&mut self, vec: Vec<T>) {
        let mut vec = std::mem::ManuallyDrop::new(vec);
        (self.data, self.size, self.capacity) = (vec.as_mut_ptr(), vec.len(), vec.capacity());
    }

    /// # Safety
    /// The fields are as `set` left them, or all zero.
    unsafe fn free(&mut self) {
        if !self.data.is_null() {
            drop(Vec::from_raw_parts(self.data, self.size, self.capacity));
        }
        (self.data, self.size, self.capacity) = (std::ptr::null_mut(), 0, 0);
    }
}

/// # Safety
/// `data` points to `size` values that outlive the slice, or `size` is 0.
unsafe fn slice<'a, T>(data: *const T, size: usize) -> &'a [T] {
    if size == 0 {
        &[]
    } else {
        std::slice::from_raw_parts(data, size)
    }
}

impl Text {
    /// # Safety
    /// As for `slice`.
    unsafe fn bytes<'a>(self) -> &'a [u8] {
        slice(self.data, self.size)
    }

    /// # Safety
    /// As for `slice`.
    unsafe fn str<'a>(self, what: impl std::fmt::Display, code: Code) -> Result<&'a str> {
        std::str::from_utf8(self.bytes()).map_err(|e| {
            let message = format!("[{what}: byte {}] expected UTF-8", e.valid_up_to());
            Error { code, message }
        })
    }
}

/// Runs an entry: errors and panics become a status and a message.
fn guard(error: *mut Owned<u8>, entry: impl FnOnce() -> Result<()>) -> i32 {
    // A panic is reported through `error`; the default hook would print it too. The hook belongs
    // to this library's own copy of std, so that nobody else's panics are silenced.
    static QUIET: Once = Once::new();
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    let outcome = catch_unwind(AssertUnwindSafe(entry)).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("panic");
        Err(Error { code: Code::Internal, message: format!("[text] unexpected: {text}") })
    });
    match outcome {
        Ok(()) => 0,
        Err(e) => {
            // SAFETY: the header asks for a valid `error`.
            unsafe { (*error).set(e.message.into_bytes()) };
            e.code as i32
        }
    }
}

fn id(id: Option<u32>) -> i32 {
    id.map_or(-1, |id| id as i32)
}

fn given(id: i32) -> Option<u32> {
    u32::try_from(id).ok()
}

fn flag(flag: i8) -> Option<bool> {
    (flag >= 0).then_some(flag != 0)
}

fn checked(id: i32) -> Result<u32> {
    u32::try_from(id).map_err(|_| Error::argument(format!("[decode] expected an id, got {id}")))
}

// SAFETY of all entries below: the caller keeps the rules of lockstep_text.h, so that handles are
// live, texts and arrays have the length given, and out-parameters are writable.

#[no_mangle]
pub unsafe extern "C" fn lst_buffer_free(buffer: *mut Owned<u8>) {
    (*buffer).free();
}

#[no_mangle]
pub unsafe extern "C" fn lst_ids_free(ids: *mut Owned<i32>) {
    (*ids).free();
}

#[no_mangle]
pub unsafe extern "C" fn lst_tokenizer_from_json(
    tokenizer_json: Text,
    tokenizer_config: Text,
    chat_template_jinja: Text,
    chat_template_json: Text,
    out: *mut *mut Handle,
    error: *mut Owned<u8>,
) -> i32 {
    guard(error, || {
        let neighbours = Neighbours {
            tokenizer_config: tokenizer_config.str("tokenizer_config.json", Code::Format)?,
            chat_template_jinja: chat_template_jinja.str("chat_template.jinja", Code::Format)?,
            chat_template_json: chat_template_json.str("chat_template.json", Code::Format)?,
        };
        let json = tokenizer_json.str("tokenizer.json", Code::Format)?;
        *out = Box::into_raw(Box::new(Handle(Arc::new(hf::load(json, &neighbours)?))));
        Ok(())
    })
}

unsafe fn texts<'a>(data: *const Text, count: usize, key: &str) -> Result<Vec<&'a str>> {
    let texts = slice(data, count).iter().enumerate();
    texts
        .map(|(i, text)| text.str(format_args!("tokenizer.ggml.{key}: number {i}"), Code::Format))
        .collect()
}

#[no_mangle]
pub unsafe extern "C" fn lst_tokenizer_from_gguf(
    vocab: *const GgufVocab,
    out: *mut *mut Handle,
    error: *mut Owned<u8>,
) -> i32 {
    guard(error, || {
        let v = &*vocab;
        let template = |text: Text, key: &str| -> Result<Option<String>> {
            Ok((text.size > 0).then_some(text.str(key, Code::Format)?.to_owned()))
        };
        let metadata = Metadata {
            model: v.model.str("tokenizer.ggml.model", Code::Format)?,
            pre: v.pre.str("tokenizer.ggml.pre", Code::Format)?,
            tokens: texts(v.tokens, v.token_count, "tokens")?,
            scores: slice(v.scores, v.score_count),
            types: slice(v.types, v.type_count),
            merges: texts(v.merges, v.merge_count, "merges")?,
            bos: given(v.bos),
            eos: given(v.eos),
            unk: given(v.unk),
            pad: given(v.pad),
            add_bos: flag(v.add_bos),
            add_eos: flag(v.add_eos),
            add_space_prefix: flag(v.add_space_prefix),
            templates: Templates {
                default: template(v.chat_template, "tokenizer.chat_template")?,
                tool_use: template(v.tool_use_template, "tokenizer.chat_template.tool_use")?,
            },
        };
        *out = Box::into_raw(Box::new(Handle(Arc::new(gguf::load(metadata)?))));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn lst_tokenizer_free(tokenizer: *mut Handle) {
    if !tokenizer.is_null() {
        drop(Box::from_raw(tokenizer));
    }
}

#[no_mangle]
pub unsafe extern "C" fn lst_tokenizer_info(tokenizer: *const Handle) -> Info {
    let t = &(*tokenizer).0;
    let has = |ids: &[u32], role: Option<u32>| role.is_some_and(|id| ids.contains(&id)) as i8;
    Info {
        vocab_size: t.size as i32,
        bos: id(t.roles.bos),
        eos: id(t.roles.eos),
        unk: id(t.roles.unk),
        pad: id(t.roles.pad),
        adds_bos: has(&t.prefix, t.roles.bos),
        adds_eos: has(&t.suffix, t.roles.eos),
    }
}

#[no_mangle]
pub unsafe extern "C" fn lst_tokenizer_template(tokenizer: *const Handle) -> Text {
    let tokenizer = &*tokenizer;
    let source = tokenizer.0.templates.default.as_deref().unwrap_or_default();
    Text { data: source.as_ptr(), size: source.len() }
}

#[no_mangle]
pub unsafe extern "C" fn lst_token_to_id(tokenizer: *const Handle, token: Text) -> i32 {
    let token = std::str::from_utf8(token.bytes()).ok();
    id(token.and_then(|token| (*tokenizer).0.id(token)))
}

#[no_mangle]
pub unsafe extern "C" fn lst_id_to_token(
    tokenizer: *const Handle,
    id: i32,
    out: *mut Owned<u8>,
) -> i32 {
    let token = given(id).and_then(|id| (*tokenizer).0.token(id));
    let found = token.is_some();
    if let Some(token) = token {
        (*out).set(token.into_bytes());
    }
    found as i32
}

#[no_mangle]
pub unsafe extern "C" fn lst_is_special(tokenizer: *const Handle, id: i32) -> i32 {
    given(id).is_some_and(|id| (*tokenizer).0.is_special(id)) as i32
}

#[no_mangle]
pub unsafe extern "C" fn lst_encode(
    tokenizer: *const Handle,
    text: Text,
    add_special: i32,
    parse_special: i32,
    out: *mut Owned<i32>,
    error: *mut Owned<u8>,
) -> i32 {
    guard(error, || {
        let text = text.str("text", Code::InvalidArgument)?;
        let ids = (*tokenizer).0.encode(text, add_special != 0, parse_special != 0)?;
        (*out).set(ids.into_iter().map(|id| id as i32).collect());
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn lst_decode(
    tokenizer: *const Handle,
    ids: *const i32,
    count: usize,
    skip_special: i32,
    out: *mut Owned<u8>,
    error: *mut Owned<u8>,
) -> i32 {
    guard(error, || {
        let ids = slice(ids, count).iter().map(|&id| checked(id)).collect::<Result<Vec<_>>>()?;
        (*out).set((*tokenizer).0.decode(&ids, skip_special != 0)?.into_bytes());
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn lst_detokenizer_new(
    tokenizer: *const Handle,
    skip_special: i32,
) -> *mut Stream {
    let tokenizer = (*tokenizer).0.clone();
    let state = Detokenizer::new(&tokenizer.plan, skip_special != 0);
    Box::into_raw(Box::new(Stream { tokenizer, state }))
}

#[no_mangle]
pub unsafe extern "C" fn lst_detokenizer_free(detokenizer: *mut Stream) {
    if !detokenizer.is_null() {
        drop(Box::from_raw(detokenizer));
    }
}

#[no_mangle]
pub unsafe extern "C" fn lst_detokenizer_push(
    detokenizer: *mut Stream,
    id: i32,
    out: *mut Owned<u8>,
    error: *mut Owned<u8>,
) -> i32 {
    guard(error, || {
        let stream = &mut *detokenizer;
        let mut text = String::new();
        stream.state.push(&stream.tokenizer, checked(id)?, &mut text)?;
        (*out).set(text.into_bytes());
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn lst_detokenizer_finish(
    detokenizer: *mut Stream,
    out: *mut Owned<u8>,
    error: *mut Owned<u8>,
) -> i32 {
    guard(error, || {
        let stream = &mut *detokenizer;
        let mut text = String::new();
        stream.state.finish(&stream.tokenizer.plan, &mut text);
        (*out).set(text.into_bytes());
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn lst_template_new(
    source: Text,
    bos_token: Text,
    eos_token: Text,
    out: *mut *mut ChatTemplate,
    error: *mut Owned<u8>,
) -> i32 {
    guard(error, || {
        let mut specials = vec![];
        for (name, text) in [("bos_token", bos_token), ("eos_token", eos_token)] {
            if text.size > 0 {
                let text = text.str(name, Code::InvalidArgument)?;
                specials.push((name.to_owned(), text.to_owned()));
            }
        }
        let source = source.str("chat template", Code::Format)?;
        *out = Box::into_raw(Box::new(ChatTemplate::new(source, None, specials)?));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn lst_template_from_tokenizer(
    tokenizer: *const Handle,
    out: *mut *mut ChatTemplate,
    error: *mut Owned<u8>,
) -> i32 {
    guard(error, || {
        let t = &(*tokenizer).0;
        let Some(source) = &t.templates.default else {
            return Err(Error::argument("[chat template] expected a default one, got none"));
        };
        let tool_use = t.templates.tool_use.as_deref();
        let template = ChatTemplate::new(source, tool_use, t.specials.clone())?;
        *out = Box::into_raw(Box::new(template));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn lst_template_free(chat_template: *mut ChatTemplate) {
    if !chat_template.is_null() {
        drop(Box::from_raw(chat_template));
    }
}

#[no_mangle]
pub unsafe extern "C" fn lst_template_render(
    chat_template: *const ChatTemplate,
    messages: Text,
    tools: Text,
    variables: Text,
    add_generation_prompt: i32,
    out: *mut Owned<u8>,
    error: *mut Owned<u8>,
) -> i32 {
    guard(error, || {
        let request = Request {
            messages: messages.str("messages", Code::InvalidArgument)?,
            tools: tools.str("tools", Code::InvalidArgument)?,
            variables: variables.str("variables", Code::InvalidArgument)?,
            add_generation_prompt: add_generation_prompt != 0,
        };
        (*out).set((*chat_template).render(&request)?.into_bytes());
        Ok(())
    })
}
