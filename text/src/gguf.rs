//! A tokenizer from the metadata of a GGUF file.

use ahash::AHashMap;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BpeBuilder;
use tokenizers::normalizers::replace::Replace;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, DecoderWrapper};

use crate::error::{Error, Result};
use crate::pretokenizers::PreTokenizer;
use crate::sentencepiece::SentencePiece;
use crate::tokenizer::{Core, Extras, Pipeline, Roles, Templates, Tokenizer};

/// Values of `tokenizer.ggml.token_type`.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

/// The metadata, each field named after its key `tokenizer.ggml.*`. Absent ids are None.
#[derive(Default)]
pub struct Metadata<'a> {
    pub model: &'a str,
    pub pre: &'a str,
    pub tokens: Vec<&'a str>,
    pub scores: &'a [f32],
    pub types: &'a [i32],
    pub merges: Vec<&'a str>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unk: Option<u32>,
    pub pad: Option<u32>,
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    pub add_space_prefix: Option<bool>,
    pub templates: Templates,
}

impl Metadata<'_> {
    fn kind(&self, id: usize) -> i32 {
        let named = [self.bos, self.eos, self.unk].contains(&Some(id as u32));
        match self.types.get(id) {
            Some(&kind) => kind,
            None if named => CONTROL,
            None => NORMAL,
        }
    }

    fn check(&self) -> Result<()> {
        let count = self.tokens.len();
        if count == 0 || count > i32::MAX as usize {
            return Err(Error::format(format!(
                "[tokenizer.ggml.tokens] expected 1 to 2^31 tokens, got {count}"
            )));
        }
        for (key, length) in [("scores", self.scores.len()), ("token_type", self.types.len())] {
            if length != 0 && length != count {
                return Err(Error::format(format!(
                    "[tokenizer.ggml.{key}] expected {count} entries, one a token, got {length}"
                )));
            }
        }
        for (key, id) in [("bos", self.bos), ("eos", self.eos), ("unknown", self.unk)] {
            if id.is_some_and(|id| id as usize >= count) {
                return Err(Error::format(format!(
                    "[tokenizer.ggml.{key}_token_id] expected less than {count}, the number of \
                     tokens, got {}",
                    id.unwrap_or_default()
                )));
            }
        }
        Ok(())
    }

    /// A token may be empty, but not twice.
    fn text(&self, id: usize) -> String {
        let token = self.tokens[id];
        if token.is_empty() { format!("[EMPTY_{id}]") } else { token.to_owned() }
    }

    fn ids(&self) -> Result<AHashMap<String, u32>> {
        let mut ids = AHashMap::with_capacity(self.tokens.len());
        for id in 0..self.tokens.len() {
            if let Some(other) = ids.insert(self.text(id), id as u32) {
                return Err(Error::format(format!(
                    "[tokenizer.ggml.tokens] expected distinct tokens, got {:?} as {other} and {id}",
                    self.text(id)
                )));
            }
        }
        Ok(ids)
    }

    /// Tokens that are cut out of a text before anything else.
    fn added_tokens(&self) -> Vec<AddedToken> {
        (0..self.tokens.len())
            .map(|id| (id, self.kind(id)))
            .filter(|(_, kind)| [UNKNOWN, CONTROL, USER_DEFINED].contains(kind))
            .map(|(id, kind)| {
                AddedToken::from(self.text(id), kind != USER_DEFINED).normalized(false)
            })
            .collect()
    }

    fn extras(mut self, roles: Roles, add_bos: bool) -> Result<Extras> {
        let affix = |wanted: bool, id: Option<u32>, name: &str| match (wanted, id) {
            (false, _) => Ok(vec![]),
            (true, Some(id)) => Ok(vec![id]),
            (true, None) => Err(Error::format(format!(
                "[tokenizer.ggml.add_{name}_token] expected a {name}_token_id beside it, got none"
            ))),
        };
        let named = [
            ("bos_token", roles.bos),
            ("eos_token", roles.eos),
            ("unk_token", roles.unk),
            ("pad_token", roles.pad),
        ];
        let count = self.tokens.len() as u32;
        Ok(Extras {
            roles,
            prefix: affix(self.add_bos.unwrap_or(add_bos), roles.bos, "bos")?,
            suffix: affix(self.add_eos.unwrap_or(false), roles.eos, "eos")?,
            size: count,
            specials: named
                .into_iter()
                .filter_map(|(name, id)| {
                    let id = id.filter(|&id| id < count)?;
                    Some((name.to_owned(), self.text(id as usize)))
                })
                .collect(),
            templates: std::mem::take(&mut self.templates),
        })
    }
}

pub fn load(metadata: Metadata) -> Result<Tokenizer> {
    metadata.check()?;
    match metadata.model {
        "gpt2" => byte_level(metadata),
        "llama" => sentencepiece(metadata),
        other => Err(Error::unsupported(format!(
            "[tokenizer.ggml.model] expected \"gpt2\" (byte-level BPE) or \"llama\" \
             (SentencePiece-style BPE), got {other:?}"
        ))),
    }
}

fn broken(e: tokenizers::Error) -> Error {
    Error::format(format!("[tokenizer.ggml] {e}"))
}

fn byte_level(metadata: Metadata) -> Result<Tokenizer> {
    let pre_tokenizer = PreTokenizer::named(metadata.pre)?;
    let ids = metadata.ids()?;
    let mut merges = Vec::with_capacity(metadata.merges.len());
    for (rank, merge) in metadata.merges.iter().enumerate() {
        // A space at the start belongs to the first half.
        let first = merge.chars().next().map_or(0, char::len_utf8);
        let Some(gap) = merge[first..].find(' ').map(|at| at + first) else {
            return Err(Error::format(format!(
                "[tokenizer.ggml.merges] expected two tokens and a space between, got {merge:?} \
                 as number {rank}"
            )));
        };
        merges.push((merge[..gap].to_owned(), merge[gap + 1..].to_owned()));
    }
    let model = BpeBuilder::new()
        .vocab_and_merges(ids, merges)
        .ignore_merges(pre_tokenizer.ignore_merges)
        .build()
        .map_err(broken)?;
    let added = metadata.added_tokens();
    let mut pipeline = tokenizers::Tokenizer::new(model);
    pipeline.with_normalizer(pre_tokenizer.normalizer()).map_err(broken)?;
    pipeline.with_pre_tokenizer(Some(pre_tokenizer.build()));
    pipeline.with_decoder(Some(ByteLevel::default()));
    pipeline.add_tokens(added).map_err(broken)?;
    let Metadata { bos, eos, unk, pad, .. } = metadata;
    let extras = metadata.extras(Roles { bos, eos, unk, pad }, pre_tokenizer.add_bos)?;
    Tokenizer::new(Core::HuggingFace(pipeline), extras)
}

fn sentencepiece(mut metadata: Metadata) -> Result<Tokenizer> {
    if metadata.scores.is_empty() {
        return Err(Error::format(
            "[tokenizer.ggml.scores] expected one score a token, got none".to_owned(),
        ));
    }
    // What SentencePiece assigns unless told otherwise.
    let count = metadata.tokens.len() as u32;
    let default = |given: Option<u32>, id: u32| given.or((id < count).then_some(id));
    metadata.unk = default(metadata.unk, 0);
    metadata.bos = default(metadata.bos, 1);
    metadata.eos = default(metadata.eos, 2);
    let Metadata { bos, eos, unk, pad, .. } = metadata;

    let ids = metadata.ids()?;
    let texts: Vec<String> = (0..metadata.tokens.len()).map(|id| metadata.text(id)).collect();
    let spellable =
        (0..texts.len()).map(|id| ![UNKNOWN, CONTROL, BYTE].contains(&metadata.kind(id))).collect();
    let prefix = metadata.add_space_prefix.unwrap_or(true);
    let model =
        SentencePiece::new(texts, ids, metadata.scores.to_vec(), spellable, unk, prefix);
    let mut steps: Vec<DecoderWrapper> = vec![
        Replace::new("\u{2581}", " ").map_err(broken)?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if prefix {
        steps.push(Strip::new(' ', 1, 0).into());
    }
    let mut pipeline = Pipeline::new(model);
    pipeline.with_decoder(Some(Sequence::new(steps)));
    pipeline.add_tokens(metadata.added_tokens()).map_err(broken)?;
    let extras = metadata.extras(Roles { bos, eos, unk, pad }, true)?;
    Tokenizer::new(Core::SentencePiece(Box::new(pipeline)), extras)
}
