//! Tokenizers and chat templates behind the C ABI of lockstep_text.h.

mod detokenizer;
mod error;
mod ffi;
mod gguf;
mod hf;
mod limits;
mod pretokenizers;
mod python;
mod sentencepiece;
mod template;
mod tokenizer;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
