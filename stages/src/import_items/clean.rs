//! Making a record's fields what stages expect: plain text without mark-up, lists as lists.

use serde_json::{Map, Value};

use crate::python;

/// Fields whose text is cleaned. All others pass through as they are.
const TEXTS: [&str; 4] = ["title", "description", "brand", "domain"];

const QUOTES: [char; 2] = ['\'', '"'];

/// What was mended in a record.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mended {
    pub markup: bool,
    pub list: bool,
}

/// Cleans `title`, `description`, `brand` and `domain` to one line of text each, and `categories` to a list; removes
/// those that are blank.
pub fn clean(fields: &mut Map<String, Value>) -> Mended {
    let mut mended = Mended::default();
    for name in TEXTS {
        if let Some(value) = fields.get(name) {
            let text = strings(value, &mut mended).join(" ");
            replace(fields, name, (!text.is_empty()).then_some(Value::String(text)));
        }
    }
    if let Some(value) = fields.get("categories") {
        let categories = strings(value, &mut mended);
        let list = Value::Array(categories.into_iter().map(Value::String).collect());
        let some = list.as_array().is_some_and(|l| !l.is_empty());
        replace(fields, "categories", some.then_some(list));
    }
    mended
}

fn replace(fields: &mut Map<String, Value>, name: &str, value: Option<Value>) {
    match value {
        Some(value) => {
            fields.insert(name.into(), value);
        }
        None => {
            fields.shift_remove(name);
        }
    }
}

/// The texts in a value, each clean and not blank.
fn strings(value: &Value, mended: &mut Mended) -> Vec<String> {
    let mut found = Vec::new();
    gather(value, mended, &mut found);
    found
}

fn gather(value: &Value, mended: &mut Mended, found: &mut Vec<String>) {
    match value {
        Value::Null | Value::Bool(_) => {}
        Value::Number(number) => found.push(number.to_string()),
        Value::Array(values) => values.iter().for_each(|v| gather(v, mended, found)),
        Value::Object(fields) => fields.values().for_each(|v| gather(v, mended, found)),
        Value::String(text) => {
            let parts = if text.trim_start().starts_with('[') { listed(text) } else { None };
            match parts {
                Some(parts) => {
                    mended.list = true;
                    found.extend(parts.iter().map(|t| plain(t, mended)).filter(|t| !t.is_empty()));
                }
                None => {
                    let text = plain(text, mended);
                    if !text.is_empty() {
                        found.push(text);
                    }
                }
            }
        }
    }
}

/// The strings of a list that was turned into text. Where quotes inside them were not escaped, as happens in real
/// catalogues, it is taken apart at quotes with a comma between them.
fn listed(text: &str) -> Option<Vec<String>> {
    if let Some(strings) = python::string_list(text) {
        return Some(strings);
    }
    let inner = text.trim().strip_prefix('[')?.strip_suffix(']')?;
    let inner = inner.strip_prefix(QUOTES)?.strip_suffix(QUOTES)?;
    let (mut strings, mut start) = (Vec::new(), 0);
    for (comma, _) in inner.match_indices(", ") {
        if comma >= start && inner[start..comma].ends_with(QUOTES) && inner[comma + 2..].starts_with(QUOTES) {
            strings.push(inner[start..comma - 1].to_owned());
            start = comma + 3;
        }
    }
    strings.push(inner.get(start..).unwrap_or_default().to_owned());
    Some(strings)
}

/// Text without entities, tags, control characters and runs of white space.
fn plain(text: &str, mended: &mut Mended) -> String {
    let mut decoded = text.to_owned();
    // Some catalogues were escaped twice (`&amp;quot;`), none was three times.
    for _ in 0..2 {
        let once = html_escape::decode_html_entities(&decoded).into_owned();
        if once == decoded {
            break;
        }
        mended.markup = true;
        decoded = once;
    }
    let untagged = without_tags(&decoded);
    mended.markup |= untagged.len() != decoded.len();
    untagged
        .split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|w| !w.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

/// A space in place of every `<tag …>`, `</tag>` and `<!-- … -->`; a `<` that opens none of them stays.
fn without_tags(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(open) = rest.find('<') {
        let inner = &rest[open + 1..];
        let named = inner.strip_prefix('/').unwrap_or(inner).starts_with(|c: char| c.is_ascii_alphabetic());
        let end = if inner.starts_with("!--") {
            inner.find("-->").map(|i| i + 3)
        } else if named {
            // A tag does not hold another `<`.
            inner.find(['>', '<']).filter(|&i| inner[i..].starts_with('>')).map(|i| i + 1)
        } else {
            None
        };
        match end {
            Some(end) => {
                out.push_str(&rest[..open]);
                out.push(' ');
                rest = &inner[end..];
            }
            None => {
                out.push_str(&rest[..=open]);
                rest = inner;
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn cleaned(record: Value) -> (Value, Mended) {
        let Value::Object(mut fields) = record else { panic!() };
        let mended = clean(&mut fields);
        (Value::Object(fields), mended)
    }

    #[test]
    fn text_loses_markup_and_runs_of_white_space() {
        for (text, expected) in [
            ("T&Uuml;RLEN &amp;quot;DIAL&amp;quot;", "TÜRLEN \"DIAL\""),
            ("<p>a<br/>b</p> 5 < 6 <3 <!-- x --> c", "a b 5 < 6 <3 c"),
            ("  a\n\t b\u{0}c ", "a b c"),
            ("a <b", "a <b"),
        ] {
            assert_eq!(cleaned(json!({"title": text})).0, json!({"title": expected}));
        }
    }

    #[test]
    fn lists_with_broken_quoting_are_still_taken_apart() {
        let list = |text: &str| listed(text).map(|l| l.join("|"));
        assert_eq!(list(r#"['5" long, 30' wide', "it's", 'c']"#).as_deref(), Some(r#"5" long, 30' wide|it's|c"#));
        assert_eq!(list(r#"["18" x 12""]"#).as_deref(), Some(r#"18" x 12""#));
        assert_eq!(list("['', ']").as_deref(), Some("', "));
        for text in ["['a'] b", "[a]", "[']", "[", "['é"] {
            assert_eq!(list(text), None, "{text}");
        }
    }

    #[test]
    fn lists_become_text_and_categories_a_list() {
        let (record, mended) = cleaned(json!({
            "title": "[Value Pack] Soap",
            "description": "['One.', \"It's two.\", '']",
            "categories": [["Beauty", "Skin &amp; Face"], "Soap"],
            "brand": "",
            "price": " 3 ",
        }));
        assert_eq!(
            record,
            json!({
                "title": "[Value Pack] Soap",
                "description": "One. It's two.",
                "categories": ["Beauty", "Skin & Face", "Soap"],
                "price": " 3 ",
            })
        );
        assert_eq!(mended, Mended { markup: true, list: true });
    }
}
