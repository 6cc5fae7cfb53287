//! Chat templates: minijinja, set up to render what transformers renders with Jinja2.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fmt;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde, Value, ValueKind};
use minijinja::{Environment, ErrorKind, Output, State};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::{Map, Value as Json};

use crate::error::{Code, Error, Result};
use crate::limits;
use crate::python;

/// Bounds the work of a rendering, at 64 bytes a unit the memory it makes, and how deep it nests values.
const FUEL: u64 = 1_000_000;
/// Expressions and values nest as deep as the source is long.
const MOST_SOURCE: usize = 1 << 18;
/// Some hundred times what published templates come to.
const MOST_FOLDING: u64 = 1 << 22;
/// minijinja compiles, prints, compares and drops by recursion: a stack for the deepest of both, at
/// about 1 KiB a level. Only what is used of it takes memory.
const STACK: usize = 1 << 29;
const DEFAULT: &str = "chat template";
const TOOL_USE: &str = "tool_use chat template";

pub struct ChatTemplate {
    environment: Environment<'static>,
    has_tool_use: bool,
    specials: Vec<(String, String)>,
}

/// What one rendering is about; the texts are JSON, empty for none.
pub struct Request<'a> {
    pub messages: &'a str,
    pub tools: &'a str,
    /// Further variables, e.g. `{"enable_thinking": false}`.
    pub variables: &'a str,
    pub add_generation_prompt: bool,
}

impl ChatTemplate {
    /// `specials`: names and texts of special tokens, which templates see as variables.
    pub fn new(
        source: &str,
        tool_use: Option<&str>,
        specials: Vec<(String, String)>,
    ) -> Result<Self> {
        let size = source.len().max(tool_use.map_or(0, str::len));
        if size > MOST_SOURCE {
            return Err(Error::format(format!(
                "[{DEFAULT}] expected at most {MOST_SOURCE} bytes, got {size}"
            )));
        }
        on_deep_stack(|| Self::compile(source, tool_use, specials))
    }

    fn compile(
        source: &str,
        tool_use: Option<&str>,
        specials: Vec<(String, String)>,
    ) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let syntax = syntax.map_err(|e| broken(DEFAULT, &e))?;
        environment.set_syntax(syntax.clone());
        environment.set_fuel(Some(FUEL));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.set_formatter(format_value);
        environment.add_filter("tojson", tojson);
        environment.add_filter(limits::FILTER, limits::kept);
        environment.add_filter("string", |v: &Value| python::str(v));
        environment.add_test("iterable", is_iterable);
        environment.add_test("sequence", is_sequence);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        let mut add = |name: &'static str, source: &str| {
            let source = prepare(source);
            if limits::folding(&source, &syntax) > MOST_FOLDING {
                return Err(Error::format(format!(
                    "[{name}] expected expressions of fewer operators"
                )));
            }
            environment
                .add_template_owned(name, limits::guard(source, &syntax))
                .map_err(|e| Error { code: Code::Format, ..broken(name, &e) })
        };
        add(DEFAULT, source)?;
        if let Some(source) = tool_use {
            add(TOOL_USE, source)?;
        }
        Ok(Self { environment, has_tool_use: tool_use.is_some(), specials })
    }

    pub fn render(&self, request: &Request) -> Result<String> {
        on_deep_stack(|| self.render_here(request))
    }

    fn render_here(&self, request: &Request) -> Result<String> {
        let variables = parse("variables", request.variables)?;
        let Json::Object(variables) = variables.unwrap_or_else(|| Json::Object(Map::new())) else {
            return Err(Error::argument("[chat template: variables] expected a JSON object"));
        };
        let messages = match parse("messages", request.messages)? {
            Some(Json::Array(messages)) => messages.into_iter().map(alias_reasoning).collect(),
            _ => return Err(Error::argument("[chat template: messages] expected a JSON array")),
        };
        let tools = parse("tools", request.tools)?.unwrap_or(Json::Null);
        if !matches!(tools, Json::Array(_) | Json::Null) {
            return Err(Error::argument("[chat template: tools] expected a JSON array"));
        }
        let name = if self.has_tool_use && !tools.is_null() { TOOL_USE } else { DEFAULT };

        let mut context: BTreeMap<String, Value> = BTreeMap::new();
        context.extend(self.specials.iter().map(|(k, v)| (k.clone(), Value::from(v.as_str()))));
        context.extend(variables.into_iter().map(|(k, v)| (k, Value::from(Serde(&v)))));
        context.insert("messages".into(), Value::from(Serde(&Json::Array(messages))));
        context.insert("tools".into(), Value::from(Serde(&tools)));
        context.insert("documents".into(), Value::from(()));
        context.insert("add_generation_prompt".into(), request.add_generation_prompt.into());
        self.environment
            .get_template(name)
            .and_then(|template| template.render(context))
            .map_err(|e| broken(name, &e))
    }
}

fn on_deep_stack<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work);
        let thread = thread.map_err(|e| Error {
            code: Code::Internal,
            message: format!("[{DEFAULT}] expected {STACK} bytes of address space, got: {e}"),
        })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn parse(what: &str, text: &str) -> Result<Option<Json>> {
    if text.is_empty() {
        return Ok(None);
    }
    serde_json::from_str(text)
        .map(Some)
        .map_err(|e| Error::argument(format!("[chat template: {what}] expected JSON: {e}")))
}

/// Templates read a message's reasoning under either of two names; transformers fills both from
/// the first of three that is there.
fn alias_reasoning(message: Json) -> Json {
    let Json::Object(fields) = message else { return message };
    let names = ["reasoning_content", "thinking", "reasoning"];
    let reasoning = names.iter().filter_map(|name| fields.get(*name)).find(|v| !v.is_null());
    let Some(reasoning) = reasoning.cloned() else { return Json::Object(fields) };
    let mut aliased = Map::new();
    aliased.insert("thinking".into(), reasoning.clone());
    aliased.extend(fields);
    aliased.insert("reasoning_content".into(), reasoning);
    Json::Object(aliased)
}

/// Jinja2 reads any line end as "\n". Transformers' `{% generation %}` block marks the reply for
/// training; rendering only needs its scope and its effect on white space.
fn prepare(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(start) = rest.find("{%") {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let Some(end) = rest.find("%}").map(|at| at + 2) else { break };
        let tag = &rest[..end];
        let name = tag[2..end - 2].trim_matches(['-', '+']).trim();
        match name {
            "generation" => out.push_str(&tag.replacen("generation", "with", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endwith", 1)),
            _ => {
                // Only the opening is passed over: a "%}" may lie inside a string of this tag.
                out.push_str("{%");
                rest = &rest[2..];
                continue;
            }
        }
        rest = &rest[end..];
    }
    out + rest
}

/// The message that a template raised, told apart from errors of its own.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn broken(name: &str, error: &minijinja::Error) -> Error {
    let mut source: Option<&dyn std::error::Error> = Some(error);
    while let Some(e) = source {
        if let Some(raised) = e.downcast_ref::<Raised>() {
            return Error::argument(format!("[{name}] {raised}"));
        }
        source = e.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return Error::argument(format!(
            "[{name}] expected less than {FUEL} steps of work, got more"
        ));
    }
    let line = error.line().map(|line| format!(": line {line}")).unwrap_or_default();
    let detail = error.detail().map(|text| format!(": {text}")).unwrap_or_default();
    Error::argument(format!("[{name}{line}] {}{detail}", error.kind()))
}

fn raise_exception(message: Rest<Value>) -> std::result::Result<Value, minijinja::Error> {
    let message = message.first().map(python::str).transpose()?.unwrap_or_default();
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception")
        .with_source(Raised(message)))
}

fn format_value(
    out: &mut Output,
    _: &mut State,
    value: &Value,
) -> std::result::Result<(), minijinja::Error> {
    match value.as_str() {
        Some(text) => out.write_str(text)?,
        None => out.write_str(&python::str(value)?)?,
    }
    Ok(())
}

/// Python can iterate over an undefined value (to no end) but not over None.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// Python: whatever has a length and an index.
fn is_sequence(value: &Value) -> bool {
    use ValueKind::{Map, Seq, String, Undefined};
    matches!(value.kind(), Undefined | String | Seq | Map)
}

/// transformers' `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn tojson(
    state: &State,
    value: &Value,
    positional: Rest<Value>,
    named: Kwargs,
) -> std::result::Result<String, minijinja::Error> {
    let argument = |index: usize, name: &str| -> std::result::Result<Value, minijinja::Error> {
        match positional.get(index) {
            Some(value) => Ok(value.clone()),
            None => Ok(named.get::<Option<Value>>(name)?.unwrap_or_default()),
        }
    };
    let indent = argument(1, "indent")?;
    let indent = match indent.as_str() {
        Some(text) => Some(text.to_owned()),
        None if indent.is_undefined() || indent.is_none() => None,
        None => Some(" ".repeat(i64::try_from(indent)?.clamp(0, 64) as usize)),
    };
    let separators = argument(2, "separators")?;
    let (item_separator, key_separator) = if separators.is_undefined() || separators.is_none() {
        ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned())
    } else {
        let part = |index| separators.get_item_by_index(index).and_then(|part| python::str(&part));
        (part(0)?, part(1)?)
    };
    let json = python::Json {
        ensure_ascii: argument(0, "ensure_ascii")?.is_true(),
        indent,
        item_separator,
        key_separator,
        sort_keys: argument(3, "sort_keys")?.is_true(),
    };
    named.assert_all_used()?;
    let out = json.dumps(value)?;
    state.consume_fuel(out.len() as u64 / 4)?;
    Ok(out)
}

/// `datetime.now().strftime(format)`
fn strftime_now(format: &str) -> std::result::Result<String, minijinja::Error> {
    let invalid = |why: &str| {
        minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {why}"))
    };
    let format = CString::new(format).map_err(|_| invalid("expected a format without NUL"))?;
    if format.is_empty() {
        return Ok(String::new());
    }
    let mut buffer = vec![0u8; 4096];
    // SAFETY: `tm` is plain data that localtime_r fills in; strftime is told the buffer's size and
    // reads a format that ends in NUL.
    let length = unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut tm: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&now, &mut tm).is_null() {
            return Err(invalid("expected a local time, got none"));
        }
        libc::strftime(buffer.as_mut_ptr().cast(), buffer.len(), format.as_ptr(), &tm)
    };
    buffer.truncate(length);
    String::from_utf8(buffer).map_err(|_| invalid("expected UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::prepare;

    #[test]
    fn generation_tags_become_a_scope() {
        assert_eq!(
            prepare("a{%- generation -%}b{% endgeneration %}c"),
            "a{%- with -%}b{% endwith %}c"
        );
        assert_eq!(prepare("{% if x == '%}' %}{% generation%}"), "{% if x == '%}' %}{% with%}");
        assert_eq!(
            prepare("{{ generation }}{% set generation = 1 %}{%"),
            "{{ generation }}{% set generation = 1 %}{%"
        );
    }
}
