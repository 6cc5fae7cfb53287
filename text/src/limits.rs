//! What minijinja does not bound by fuel: circles of values, and the folding of constants.

use minijinja::machinery::{tokenize, Token};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

/// Name of the filter `kept` in templates. A namespace may keep values, but neither a namespace nor a
/// macro (which holds the variables around it). Else it could come to hold itself: minijinja would
/// follow the circle to the end of the stack, and never free it.
pub const FILTER: &str = "__kept";

/// `{% set a.b = x %}` becomes `{% set a.b = (x)|__kept %}`. What is no template is left to the parser.
pub fn guard(source: String, syntax: &SyntaxConfig) -> String {
    let mut out = String::with_capacity(source.len());
    let mut copied = 0;
    let mut copy_to = |end: u32, then: &str| {
        let end = end as usize;
        out.push_str(&source[copied..end]);
        out.push_str(then);
        copied = end;
    };
    let mut tokens = tokenize(&source, false, syntax.clone()).map_while(|token| token.ok());
    while let Some((token, _)) = tokens.next() {
        if !matches!(token, Token::BlockStart)
            || !matches!(tokens.next(), Some((Token::Ident("set"), _)))
        {
            continue;
        }
        let (mut dotted, mut value) = (false, false);
        for (token, span) in tokens.by_ref() {
            match token {
                Token::Dot if !value => dotted = true,
                Token::Assign if dotted && !value => {
                    value = true;
                    copy_to(span.end_offset, "(");
                }
                Token::Assign => value = true,
                Token::BlockEnd => {
                    if dotted && value {
                        copy_to(span.start_offset, &format!(")|{FILTER} "));
                    }
                    break;
                }
                _ => {}
            }
        }
    }
    out + &source[copied..]
}

/// What constant folding may cost: for each operator it looks at the whole expression again.
pub fn folding(source: &str, syntax: &SyntaxConfig) -> u64 {
    let (mut cost, mut start, mut operators) = (0, 0, 0);
    for (token, span) in tokenize(source, false, syntax.clone()).map_while(|token| token.ok()) {
        use Token::{Div, FloorDiv, Minus, Mod, Mul, Plus, Pow, Tilde};
        match token {
            Token::BlockStart | Token::VariableStart => (start, operators) = (span.start_offset, 0),
            Tilde | Plus | Minus | Mul | Div | FloorDiv | Mod | Pow => operators += 1,
            Token::Ident("and" | "or" | "in") => operators += 1,
            Token::BlockEnd | Token::VariableEnd => {
                cost += operators * u64::from(span.end_offset - start);
            }
            _ => {}
        }
    }
    cost
}

/// The value, if it may be kept.
pub fn kept(state: &State, value: Value) -> Result<Value, Error> {
    // An iterator may hold anything, and may run only once.
    let value = match value.kind() {
        ValueKind::Iterable => value.try_iter()?.collect(),
        _ => value,
    };
    let mut open = vec![value.clone()];
    let mut seen = 0;
    while let Some(value) = open.pop() {
        seen += 1;
        state.consume_fuel(u64::from(seen % 4 == 0))?;
        let name = value.as_object().map_or("", |object| object.type_name());
        if ["Namespace", "Macro", "Closure", "Loop"].iter().any(|part| name.ends_with(part)) {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "expected a value to keep in a namespace, got a namespace, a macro or a loop",
            ));
        }
        match value.kind() {
            ValueKind::Seq => open.extend(value.try_iter()?),
            ValueKind::Map => {
                for key in value.try_iter()? {
                    open.push(value.get_item(&key)?);
                }
            }
            ValueKind::Iterable => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    "expected a value to keep in a namespace, got an iterator inside one",
                ))
            }
            _ => {}
        }
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_attributes_are_guarded() {
        let syntax = SyntaxConfig::default();
        let guarded = |source: &str| guard(source.to_owned(), &syntax);
        for same in ["a{% set b = c.d %}", "{% raw %}{% set a.b = 1 %}{% endraw %}", "{% set a.b %}x"] {
            assert_eq!(guarded(same), same);
        }
        assert_eq!(
            guarded("é{%- set a.b = c if d == '%}' else [1] -%} x"),
            "é{%- set a.b =( c if d == '%}' else [1] )|__kept -%} x"
        );
    }
}
