//! A tokenizer from tokenizer.json, with what tokenizer_config.json and its neighbours add.

use serde_json::{Map, Value};
use tokenizers::{
    AddedToken, Encoding, Model, PostProcessor, PostProcessorWrapper, Token, Tokenizer as Pipeline,
};

use crate::error::{Error, Result};
use crate::tokenizer::{Core, Extras, Roles, Templates, Tokenizer};

/// Special tokens with a name of their own in tokenizer_config.json.
const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Texts of the files beside tokenizer.json; empty where there is none.
#[derive(Default)]
pub struct Neighbours<'a> {
    pub tokenizer_config: &'a str,
    pub chat_template_jinja: &'a str,
    pub chat_template_json: &'a str,
}

pub fn load(tokenizer_json: &str, neighbours: &Neighbours) -> Result<Tokenizer> {
    let mut pipeline: Pipeline = tokenizer_json
        .parse()
        .map_err(|e| Error::format(format!("[tokenizer.json] expected a tokenizer: {e}")))?;
    let config = object("tokenizer_config.json", neighbours.tokenizer_config)?;
    add_tokens(&mut pipeline, &config)?;

    let size = vocabulary_size(&pipeline)?;
    let mut specials = vec![];
    for name in NAMED {
        if let Some(text) = config.get(name).and_then(content) {
            specials.push((name.to_owned(), text));
        }
    }
    let role = |name: &str| {
        let (_, text) = specials.iter().find(|(key, _)| key == name)?;
        pipeline.token_to_id(text)
    };
    let mut roles = Roles {
        bos: role("bos_token"),
        eos: role("eos_token"),
        unk: role("unk_token"),
        pad: role("pad_token"),
    };
    let (prefix, suffix) = affixes(pipeline.get_post_processor(), &config, &roles)?;
    if let (None, [only]) = (roles.bos, prefix.as_slice()) {
        roles.bos = Some(*only);
    }
    let templates = templates(neighbours, &config)?;
    Tokenizer::new(
        Core::HuggingFace(pipeline),
        Extras { roles, prefix, suffix, size, templates, specials },
    )
}

fn object(file: &str, text: &str) -> Result<Map<String, Value>> {
    if text.is_empty() {
        return Ok(Map::new());
    }
    serde_json::from_str(text)
        .map_err(|e| Error::format(format!("[{file}] expected a JSON object: {e}")))
}

/// A token is written as its text or as an object with the text inside.
fn content(token: &Value) -> Option<String> {
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
}

/// Adds the tokens that tokenizer_config.json names and tokenizer.json lacks, as transformers does.
fn add_tokens(pipeline: &mut Pipeline, config: &Map<String, Value>) -> Result<()> {
    let mut tokens = vec![];
    let by_id = config.get("added_tokens_decoder").and_then(Value::as_object);
    let mut by_id: Vec<(u64, &Value)> =
        by_id.into_iter().flatten().filter_map(|(id, t)| Some((id.parse().ok()?, t))).collect();
    by_id.sort_by_key(|(id, _)| *id);
    for (_, token) in by_id {
        let Some(text) = content(token) else { continue };
        let flag = |name: &str| token.get(name).and_then(Value::as_bool);
        let special = flag("special").unwrap_or(false);
        tokens.push(
            AddedToken::from(text, special)
                .normalized(flag("normalized").unwrap_or(!special))
                .lstrip(flag("lstrip").unwrap_or(false))
                .rstrip(flag("rstrip").unwrap_or(false))
                .single_word(flag("single_word").unwrap_or(false)),
        );
    }
    let named = NAMED.iter().filter_map(|name| config.get(*name));
    let extra =
        ["extra_special_tokens", "additional_special_tokens"].into_iter().flat_map(|name| {
            match config.get(name) {
                Some(Value::Array(list)) => list.iter().collect(),
                Some(Value::Object(map)) => map.values().collect(),
                _ => vec![],
            }
        });
    tokens.extend(named.chain(extra).filter_map(content).map(|text| AddedToken::from(text, true)));

    let known = pipeline.get_added_vocabulary().get_vocab();
    tokens.retain(|token| !known.contains_key(&token.content));
    pipeline
        .add_tokens(tokens)
        .map_err(|e| Error::format(format!("[tokenizer_config.json] added tokens: {e}")))?;
    Ok(())
}

fn vocabulary_size(pipeline: &Pipeline) -> Result<u32> {
    let model = pipeline.get_model().get_vocab();
    let added = pipeline.get_added_vocabulary().get_vocab();
    let largest = model.values().chain(added.values()).max().copied();
    match largest {
        None => Ok(0),
        Some(id) if id < i32::MAX as u32 => Ok(id + 1),
        Some(id) => Err(Error::format(format!(
            "[tokenizer.json] expected ids below {}, got {id}",
            i32::MAX
        ))),
    }
}

/// Ids before and after every text: by `add_bos_token` and `add_eos_token` where the config has
/// them, else what the post-processor does to a text of one token.
fn affixes(
    processor: Option<&PostProcessorWrapper>,
    config: &Map<String, Value>,
    roles: &Roles,
) -> Result<(Vec<u32>, Vec<u32>)> {
    let keys = ["add_bos_token", "add_eos_token"];
    if keys.iter().any(|key| config.contains_key(*key)) {
        let wanted = |key| config.get(key).and_then(Value::as_bool).unwrap_or(false);
        let ids = |key, id: Option<u32>| id.filter(|_| wanted(key)).into_iter().collect();
        return Ok((ids(keys[0], roles.bos), ids(keys[1], roles.eos)));
    }
    let Some(processor) = processor else { return Ok((vec![], vec![])) };
    const TEXT: u32 = u32::MAX;
    let encoding = Encoding::from_tokens(vec![Token::new(TEXT, String::new(), (0, 0))], 0);
    let processed = processor
        .process(encoding, None, true)
        .map_err(|e| Error::format(format!("[tokenizer.json: post_processor] {e}")))?;
    let mut parts = processed.get_ids().split(|&id| id == TEXT).map(<[u32]>::to_vec);
    match (parts.next(), parts.next(), parts.next()) {
        (Some(prefix), Some(suffix), None) => Ok((prefix, suffix)),
        _ => Err(Error::unsupported(
            "[tokenizer.json: post_processor] expected the text once, with tokens before and \
             after; got another arrangement",
        )),
    }
}

/// chat_template.jinja comes before chat_template.json, and that before tokenizer_config.json.
fn templates(neighbours: &Neighbours, config: &Map<String, Value>) -> Result<Templates> {
    if !neighbours.chat_template_jinja.is_empty() {
        let default = Some(neighbours.chat_template_jinja.to_owned());
        return Ok(Templates { default, tool_use: None });
    }
    let file = object("chat_template.json", neighbours.chat_template_json)?;
    let source = file.get("chat_template").or_else(|| config.get("chat_template"));
    let mut templates = Templates::default();
    match source {
        Some(Value::String(text)) => templates.default = Some(text.clone()),
        Some(Value::Array(list)) => {
            for entry in list {
                let text = entry.get("template").and_then(Value::as_str).map(str::to_owned);
                match entry.get("name").and_then(Value::as_str) {
                    Some("default") => templates.default = text,
                    Some("tool_use") => templates.tool_use = text,
                    _ => {}
                }
            }
        }
        _ => {}
    }
    Ok(templates)
}
