//! Ids to text, one at a time: `decode` is nothing but this, run to the end.
//!
//! The steps of a tokenizer.json's `decoder` are sorted into: maps of one token, bytes to
//! characters, and a strip at the start of the text. Each needs no more state than the bytes of an
//! unfinished character, so a token costs its own length and not that of the history.

use std::sync::LazyLock;

use tokenizers::{Decoder, DecoderWrapper};

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// How tokens spell bytes.
#[derive(Clone, Copy, PartialEq)]
enum Bytes {
    Never,
    /// `<0xE4>`
    Fallback,
    /// GPT-2's alphabet: one printable character a byte.
    Level,
}

/// A tokenizer's decoder, made ready to run a token at a time.
pub struct Plan {
    maps: Vec<DecoderWrapper>,
    bytes: Bytes,
    /// At most so many of that character are dropped at the start of the text.
    strip: Option<(char, usize)>,
    /// No decoder at all: `tokenizers` puts spaces between the tokens.
    spaced: bool,
}

impl Plan {
    pub fn new(decoder: Option<&DecoderWrapper>) -> Result<Self> {
        let mut plan =
            Self { maps: vec![], bytes: Bytes::Never, strip: None, spaced: decoder.is_none() };
        let mut steps = vec![];
        flatten(decoder, &mut steps);
        let mut fused = false;
        for step in steps {
            match step {
                DecoderWrapper::Fuse(_) => fused = true,
                DecoderWrapper::Strip(s) if fused && s.stop == 0 && plan.strip.is_none() => {
                    plan.strip = Some((s.content, s.start));
                }
                _ if fused || plan.bytes != Bytes::Never => return Err(unsupported(step)),
                DecoderWrapper::ByteLevel(_) => {
                    plan.bytes = Bytes::Level;
                    fused = true;
                }
                DecoderWrapper::ByteFallback(_) => plan.bytes = Bytes::Fallback,
                DecoderWrapper::Replace(_) | DecoderWrapper::Metaspace(_) => {
                    plan.maps.push(step.clone());
                }
                _ => return Err(unsupported(step)),
            }
        }
        Ok(plan)
    }

    /// The token after the maps. They may treat the first token of a text differently.
    fn mapped(&self, token: String, first: bool) -> Result<String> {
        let mut tokens = if first { vec![token] } else { vec![String::new(), token] };
        for map in &self.maps {
            tokens = map
                .decode_chain(tokens)
                .map_err(|e| Error::format(format!("[tokenizer.json: decoder] {e}")))?;
        }
        Ok(tokens.pop().unwrap_or_default())
    }
}

fn flatten<'a>(decoder: Option<&'a DecoderWrapper>, steps: &mut Vec<&'a DecoderWrapper>) {
    match decoder {
        Some(DecoderWrapper::Sequence(sequence)) => {
            sequence.get_decoders().iter().for_each(|step| flatten(Some(step), steps));
        }
        other => steps.extend(other),
    }
}

fn unsupported(step: &DecoderWrapper) -> Error {
    let debug = format!("{step:?}");
    let name = debug.split('(').next().unwrap_or_default();
    Error::unsupported(format!(
        "[tokenizer.json: decoder] expected ByteLevel, Metaspace, or Replace and ByteFallback \
         followed by Fuse and Strip at the start; got {name} at that place"
    ))
}

/// The state of one text being decoded.
pub struct Detokenizer {
    skip_special: bool,
    first: bool,
    /// Bytes that do not yet make a character.
    pending: Vec<u8>,
    /// How much `Plan::strip` may still drop.
    strip: usize,
}

impl Detokenizer {
    pub fn new(plan: &Plan, skip_special: bool) -> Self {
        let strip = plan.strip.map_or(0, |(_, count)| count);
        Self { skip_special, first: true, pending: vec![], strip }
    }

    /// Appends the text that `id` makes certain. An id without a token adds nothing.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32, out: &mut String) -> Result<()> {
        if self.skip_special && tokenizer.is_special(id) {
            return Ok(());
        }
        let Some(token) = tokenizer.token(id) else { return Ok(()) };
        let plan = &tokenizer.plan;
        let first = std::mem::replace(&mut self.first, false);
        let token = plan.mapped(token, first)?;
        let start = out.len();
        match plan.bytes {
            Bytes::Level => {
                append_level_bytes(&token, &mut self.pending);
                self.drain(plan, out, false);
            }
            Bytes::Fallback => match fallback_byte(&token) {
                Some(byte) => {
                    self.pending.push(byte);
                    self.drain(plan, out, false);
                }
                None => {
                    self.drain(plan, out, true);
                    out.push_str(&token);
                }
            },
            Bytes::Never => {
                if plan.spaced && !first {
                    out.push(' ');
                }
                out.push_str(&token);
            }
        }
        self.strip_start(plan, start, out);
        Ok(())
    }

    /// Appends what is left and starts anew. Bytes that make no character become U+FFFD.
    pub fn finish(&mut self, plan: &Plan, out: &mut String) {
        let start = out.len();
        self.drain(plan, out, true);
        self.strip_start(plan, start, out);
        *self = Self::new(plan, self.skip_special);
    }

    /// Moves whole characters from `pending` to `out`, at the `end` everything. As in the
    /// reference, what is not UTF-8 becomes one U+FFFD a byte with byte fallback, and one a
    /// maximal subpart with byte-level tokens.
    fn drain(&mut self, plan: &Plan, out: &mut String, end: bool) {
        let mut bytes = self.pending.as_slice();
        while !bytes.is_empty() {
            let (valid, bad) = match std::str::from_utf8(bytes) {
                Ok(text) => (text.len(), 0),
                Err(e) if e.error_len().is_some() || end => {
                    let rest = bytes.len() - e.valid_up_to();
                    (e.valid_up_to(), e.error_len().unwrap_or(rest))
                }
                Err(e) if e.valid_up_to() == 0 => break,
                Err(e) => (e.valid_up_to(), 0),
            };
            out.push_str(std::str::from_utf8(&bytes[..valid]).expect("checked above"));
            let marks = if plan.bytes == Bytes::Fallback { bad } else { bad.min(1) };
            out.extend(std::iter::repeat_n(REPLACEMENT, marks));
            bytes = &bytes[valid + bad..];
        }
        self.pending.drain(..self.pending.len() - bytes.len());
    }

    fn strip_start(&mut self, plan: &Plan, start: usize, out: &mut String) {
        let Some((content, _)) = plan.strip else { return };
        while self.strip > 0 && out.len() > start {
            if out[start..].starts_with(content) {
                out.remove(start);
                self.strip -= 1;
            } else {
                self.strip = 0;
            }
        }
    }
}

/// `<0xE4>` to its byte, by the reference's rule.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// A token with a character outside the alphabet stands for itself.
fn append_level_bytes(token: &str, bytes: &mut Vec<u8>) {
    let before = bytes.len();
    for c in token.chars() {
        match LEVEL_BYTES.get(c as usize).copied().flatten() {
            Some(byte) => bytes.push(byte),
            None => {
                bytes.truncate(before);
                bytes.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// GPT-2's alphabet, reversed: printable Latin-1 bytes are their own character, the others are
/// numbered from U+0100.
static LEVEL_BYTES: LazyLock<Vec<Option<u8>>> = LazyLock::new(|| {
    let mut table = vec![None; 0x100];
    for byte in 0..=255u8 {
        match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => table[byte as usize] = Some(byte),
            _ => table.push(Some(byte)),
        }
    }
    table
});

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    #[test]
    fn alphabet_is_that_of_tokenizers() {
        let ours: Vec<char> = (0..LEVEL_BYTES.len() as u32)
            .filter(|&c| LEVEL_BYTES[c as usize].is_some())
            .filter_map(char::from_u32)
            .collect();
        let mut theirs: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        theirs.sort_unstable();
        assert_eq!(ours, theirs);
    }
}
