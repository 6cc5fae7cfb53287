//! One tokenizer, whether it came from tokenizer.json or from GGUF metadata.

use tokenizers::{
    AddedVocabulary, DecoderWrapper, Encoding, Model, NormalizerWrapper, OffsetType,
    PostProcessorWrapper, PreTokenizer, PreTokenizerWrapper, TokenizerImpl,
};

use crate::detokenizer::{Detokenizer, Plan};
use crate::error::{Error, Result};
use crate::sentencepiece::SentencePiece;

pub type Pipeline<M> =
    TokenizerImpl<M, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

pub enum Core {
    HuggingFace(tokenizers::Tokenizer),
    SentencePiece(Box<Pipeline<SentencePiece>>),
}

/// Ids of the tokens with a role, where there are such.
#[derive(Default, Clone, Copy)]
pub struct Roles {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unk: Option<u32>,
    pub pad: Option<u32>,
}

/// Sources of the chat templates that came with a tokenizer.
#[derive(Default)]
pub struct Templates {
    pub default: Option<String>,
    /// Takes the place of `default` when tools are given.
    pub tool_use: Option<String>,
}

pub struct Tokenizer {
    core: Core,
    /// The added tokens of `core`, but special ones are not recognised in text.
    plain: AddedVocabulary,
    pub plan: Plan,
    pub roles: Roles,
    /// What `encode` puts before and after the text when asked for special tokens.
    pub prefix: Vec<u32>,
    pub suffix: Vec<u32>,
    /// One more than the largest id.
    pub size: u32,
    pub templates: Templates,
    /// `bos_token` and the like, as templates see them.
    pub specials: Vec<(String, String)>,
}

/// What a loader found besides the pipeline itself.
#[derive(Default)]
pub struct Extras {
    pub roles: Roles,
    pub prefix: Vec<u32>,
    pub suffix: Vec<u32>,
    pub size: u32,
    pub templates: Templates,
    pub specials: Vec<(String, String)>,
}

/// The same expression on either pipeline.
macro_rules! on_core {
    ($core:expr, $pipeline:ident => $do:expr) => {
        match $core {
            Core::HuggingFace($pipeline) => $do,
            Core::SentencePiece($pipeline) => $do,
        }
    };
}

impl Tokenizer {
    pub fn new(core: Core, extras: Extras) -> Result<Self> {
        let (mut plain, plan) = on_core!(&core, p => {
            (p.get_added_vocabulary().clone(), Plan::new(p.get_decoder())?)
        });
        plain.set_encode_special_tokens(true);
        let Extras { roles, prefix, suffix, size, templates, specials } = extras;
        Ok(Self { core, plain, plan, roles, prefix, suffix, size, templates, specials })
    }

    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>> {
        let body = on_core!(&self.core, p => {
            let added = if parse_special { p.get_added_vocabulary() } else { &self.plain };
            run(p, added, text)
        })
        .map_err(|e| Error::argument(format!("[tokenizer] encode: {e}")))?;
        if !add_special {
            return Ok(body.get_ids().to_vec());
        }
        Ok([&self.prefix, body.get_ids(), &self.suffix].concat())
    }

    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let mut out = String::new();
        let mut detokenizer = Detokenizer::new(&self.plan, skip_special);
        for &id in ids {
            detokenizer.push(self, id, &mut out)?;
        }
        detokenizer.finish(&self.plan, &mut out);
        Ok(out)
    }

    /// The token as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        on_core!(&self.core, p => p.id_to_token(id))
    }

    pub fn id(&self, token: &str) -> Option<u32> {
        on_core!(&self.core, p => p.token_to_id(token))
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.plain.get_added_tokens_decoder().get(&id).is_some_and(|token| token.special)
    }
}

/// `TokenizerImpl::encode_fast` without truncation and padding, which a file may carry but a
/// language model never wants, and with a choice of added tokens.
fn run<M: Model>(
    pipeline: &Pipeline<M>,
    added: &AddedVocabulary,
    text: &str,
) -> tokenizers::Result<Encoding> {
    let mut parts = added.extract_and_normalize(pipeline.get_normalizer(), text);
    if let Some(pre_tokenizer) = pipeline.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut parts)?;
    }
    pipeline.get_model().tokenize_in_pretokenized(&mut parts, None)?;
    parts.into_encoding(None, 0, OffsetType::None)
}
