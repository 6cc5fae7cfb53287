//! Byte-level pre-tokenizers by the name a GGUF gives them (`tokenizer.ggml.pre`).
//!
//! The patterns are those of the models' own tokenizer.json; llama.cpp's src/llama-vocab.cpp maps
//! the names to them.

use tokenizers::normalizers::{NormalizerWrapper, NFC};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::punctuation::Punctuation;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::error::{Error, Result};

/// What a pre-tokenizer name says about a byte-level BPE.
pub struct PreTokenizer {
    /// Unicode NFC comes first.
    pub nfc: bool,
    /// A word that is in the vocabulary is taken whole.
    pub ignore_merges: bool,
    /// Default of `tokenizer.ggml.add_bos_token`.
    pub add_bos: bool,
    steps: Vec<Step>,
}

#[derive(Clone, Copy)]
enum Step {
    /// Matches become pieces of their own.
    Split(&'static str),
    Punctuation,
    Digits,
    /// GPT-2's pattern, then bytes to characters.
    Gpt2,
    /// Bytes to characters.
    Bytes,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED_CODER: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK_LETTERS: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u{1F7D}ᾀ-ᾴᾶ-ᾼ\u{1FBE}ῂ-ῄῆ-ῌῐ-\u{1FD3}ῖ-\u{1FDB}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u{2126}ℨ\u{212A}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";

/// Every name that `named` knows, for messages.
const NAMES: &str = "bailingmoe, bailingmoe2, bloom, chatglm-bpe, codeshell, command-r, dbrx, \
    deepseek-coder, deepseek-llm, deepseek-r1-qwen, deepseek-v3, default, exaone, exaone4, falcon, \
    falcon3, gigachat, glm4, gpt-2, gpt-4o, gpt3-finnish, grok-2, hunyuan, hunyuan-dense, jais, \
    kanana2, lfm2, llada-moe, llama-bpe, llama-v3, llama3, llama4, megrez, mellum, minerva-7b, \
    mpt, olmo, phi-2, poro-chat, qwen2, qwen35, refact, seed-coder, smaug-bpe, smollm, stablelm2, \
    starcoder, tekken, trillion, viking";

impl PreTokenizer {
    fn new(steps: Vec<Step>) -> Self {
        Self { nfc: false, ignore_merges: false, add_bos: false, steps }
    }

    fn nfc(mut self) -> Self {
        self.nfc = true;
        self
    }

    fn ignore_merges(mut self) -> Self {
        self.ignore_merges = true;
        self
    }

    fn add_bos(mut self) -> Self {
        self.add_bos = true;
        self
    }

    /// Error `unsupported`, with the known names, for a name that is not among them.
    pub fn named(name: &str) -> Result<Self> {
        use Step::{Bytes, Digits, Gpt2, Punctuation, Split};
        let split = |pattern| Self::new(vec![Split(pattern), Bytes]);
        let digits_then_gpt2 = || Self::new(vec![Split(r"\p{N}"), Gpt2]);
        Ok(match name {
            // llama.cpp's own choice for files that name none: Falcon's, nearly.
            "" | "default" => Self::new(vec![
                Split(r"[\p{P}$+<=>^~|]+"),
                Split(GPT2),
                Split(r"\p{N}+"),
                Split("[0-9][0-9][0-9]"),
                Bytes,
            ]),
            "gpt-2" | "phi-2" | "gigachat" | "mellum" | "exaone4" | "jais" | "trillion" => {
                Self::new(vec![Gpt2])
            }
            "mpt" | "olmo" => Self::new(vec![Gpt2]).nfc(),
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "lfm2" => {
                split(LLAMA3).ignore_merges().add_bos()
            }
            "dbrx" | "smaug-bpe" | "chatglm-bpe" | "glm4" => split(LLAMA3),
            "qwen2" | "megrez" => split(QWEN2).nfc(),
            "deepseek-r1-qwen" | "stablelm2" | "hunyuan" | "grok-2" => split(QWEN2),
            "qwen35" => split(QWEN35).nfc(),
            "smollm" | "starcoder" | "refact" | "codeshell" | "exaone" | "minerva-7b" => {
                digits_then_gpt2()
            }
            "command-r" => digits_then_gpt2().nfc(),
            "tekken" => split(TEKKEN).ignore_merges().add_bos(),
            "gpt-4o" | "llama4" | "kanana2" => split(GPT4O),
            "seed-coder" => split(SEED_CODER),
            "bailingmoe" | "bailingmoe2" | "llada-moe" => split(
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
            ),
            "falcon" => Self::new(vec![Punctuation, Gpt2, Digits, Split("[0-9][0-9][0-9]")]),
            "deepseek-llm" => Self::new(vec![
                Split(r"[\r\n]"),
                Split(DEEPSEEK_LETTERS),
                Split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
                Split(r"\s+$"),
                Split("[一-龥ࠀ-一가-\u{d7ff}]+"),
                Digits,
                Bytes,
            ]),
            "deepseek-coder" => Self::new(vec![
                Split(r"[\r\n]"),
                Split(r"\s?\p{L}+"),
                Split(r"\s?\p{P}+"),
                Split("[一-龥ࠀ-一가-\u{d7ff}]+"),
                Split(r"\p{N}"),
                Bytes,
            ]),
            "deepseek-v3" | "hunyuan-dense" => Self::new(vec![
                Split(r"\p{N}{1,3}"),
                Split("[一-龥\u{3040}-ゟ゠-ヿ]+"),
                Split(DEEPSEEK3),
                Bytes,
            ]),
            "bloom" | "gpt3-finnish" | "poro-chat" => split(BLOOM),
            "viking" => Self::new(vec![Split(BLOOM), Split(r"\p{N}"), Bytes]),
            _ => {
                return Err(Error::unsupported(format!(
                    "[tokenizer.ggml.pre] expected one of {NAMES}; got \"{name}\""
                )))
            }
        })
    }

    pub fn normalizer(&self) -> Option<NormalizerWrapper> {
        self.nfc.then(|| NFC::default().into())
    }

    pub fn build(&self) -> PreTokenizerWrapper {
        let isolated = SplitDelimiterBehavior::Isolated;
        let steps = self.steps.iter().map(|step| match *step {
            Step::Split(pattern) => {
                let pattern = SplitPattern::Regex(pattern.to_owned());
                Split::new(pattern, isolated, false).expect("a constant pattern").into()
            }
            Step::Punctuation => Punctuation::new(SplitDelimiterBehavior::Contiguous).into(),
            Step::Digits => Digits::new(false).into(),
            Step::Gpt2 => ByteLevel::new(false, true, true).into(),
            Step::Bytes => ByteLevel::new(false, true, false).into(),
        });
        Sequence::new(steps.collect()).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_name_builds() {
        for name in NAMES.split(',').map(str::trim) {
            PreTokenizer::named(name).unwrap_or_else(|e| panic!("{}", e.message)).build();
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let error = PreTokenizer::named("nonesuch").err().expect("an error");
        assert!(error.message.contains("nonesuch") && error.message.contains("smollm"));
    }
}
