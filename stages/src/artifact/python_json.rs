//! JSON as Python's `json` module writes it with `ensure_ascii=False`: the layout of every published file.
//!
//! Two layouts: [`write_pretty`] is `json.dump(value, indent=2)`, [`write_line`] is `json.dumps(value)` with its
//! `", "` and `": "` separators. Both append to a byte buffer, so that a builder can render a record once and copy it
//! into a million samples. Reading is left to `serde_json`.

use serde_json::{Map, Number, Value};

/// Spaces per level in [`write_pretty`].
pub const INDENT: usize = 2;

/// Appends `text` as a JSON string: `"`, `\` and control characters escaped, everything else as it is.
pub fn write_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    write_escaped(out, text);
    out.push(b'"');
}

/// Appends `text` as it stands between the quotes of a JSON string; lets a string be put together from parts.
pub fn write_escaped(out: &mut Vec<u8>, text: &str) {
    let bytes = text.as_bytes();
    let special = |byte: u8| byte < 0x20 || byte == b'"' || byte == b'\\';
    // Most texts have nothing to escape, which is told faster for all bytes at once than one by one.
    if !bytes.iter().fold(false, |found, &byte| found | special(byte)) {
        out.extend_from_slice(bytes);
        return;
    }
    let mut start = 0;
    for (i, &byte) in bytes.iter().enumerate() {
        if !special(byte) {
            continue;
        }
        out.extend_from_slice(&bytes[start..i]);
        start = i + 1;
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            0x08 => out.extend_from_slice(b"\\b"),
            0x0c => out.extend_from_slice(b"\\f"),
            _ => out.extend_from_slice(format!("\\u{byte:04x}").as_bytes()),
        }
    }
    out.extend_from_slice(&bytes[start..]);
}

/// Appends a line break and the indentation of `level`.
pub fn write_break(out: &mut Vec<u8>, level: usize) {
    out.push(b'\n');
    out.resize(out.len() + level * INDENT, b' ');
}

/// Appends `value` over several lines, as it stands at nesting `level` of a document (0 for the document itself).
pub fn write_pretty(out: &mut Vec<u8>, value: &Value, level: usize) {
    match value {
        Value::Array(items) => write_pretty_list(out, items, level, write_pretty),
        Value::Object(fields) => write_object(out, fields, level),
        scalar => write_scalar(out, scalar),
    }
}

/// As [`write_pretty`], for an object.
pub fn write_object(out: &mut Vec<u8>, fields: &Map<String, Value>, level: usize) {
    write_pretty_fields(out, fields, level, write_pretty);
}

/// Appends an array over several lines, each item by `write`, which is told the item's level.
pub fn write_pretty_list<T>(
    out: &mut Vec<u8>,
    items: impl IntoIterator<Item = T>,
    level: usize,
    mut write: impl FnMut(&mut Vec<u8>, T, usize),
) {
    out.push(b'[');
    let mut empty = true;
    for item in items {
        if !std::mem::take(&mut empty) {
            out.push(b',');
        }
        write_break(out, level + 1);
        write(out, item, level + 1);
    }
    if !empty {
        write_break(out, level);
    }
    out.push(b']');
}

/// As [`write_pretty_list`], for the fields of an object.
pub fn write_pretty_fields<N: AsRef<str>, T>(
    out: &mut Vec<u8>,
    fields: impl IntoIterator<Item = (N, T)>,
    level: usize,
    mut write: impl FnMut(&mut Vec<u8>, T, usize),
) {
    out.push(b'{');
    let mut empty = true;
    for (name, field) in fields {
        if !std::mem::take(&mut empty) {
            out.push(b',');
        }
        write_break(out, level + 1);
        write_string(out, name.as_ref());
        out.extend_from_slice(b": ");
        write(out, field, level + 1);
    }
    if !empty {
        write_break(out, level);
    }
    out.push(b'}');
}

/// Appends strings as a pretty-printed array at nesting `level`.
pub fn write_strings<T: AsRef<str>>(out: &mut Vec<u8>, strings: &[T], level: usize) {
    write_pretty_list(out, strings, level, |out, text, _| write_string(out, text.as_ref()));
}

/// Appends `value` on one line.
pub fn write_line(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Array(items) => write_line_list(out, items, write_line),
        Value::Object(fields) => write_line_fields(out, fields, write_line),
        scalar => write_scalar(out, scalar),
    }
}

/// Appends an array on one line, each item by `write`.
pub fn write_line_list<T>(
    out: &mut Vec<u8>,
    items: impl IntoIterator<Item = T>,
    mut write: impl FnMut(&mut Vec<u8>, T),
) {
    out.push(b'[');
    let mut empty = true;
    for item in items {
        if !std::mem::take(&mut empty) {
            out.extend_from_slice(b", ");
        }
        write(out, item);
    }
    out.push(b']');
}

/// As [`write_line_list`], for the fields of an object.
pub fn write_line_fields<N: AsRef<str>, T>(
    out: &mut Vec<u8>,
    fields: impl IntoIterator<Item = (N, T)>,
    mut write: impl FnMut(&mut Vec<u8>, T),
) {
    out.push(b'{');
    let mut empty = true;
    for (name, field) in fields {
        if !std::mem::take(&mut empty) {
            out.extend_from_slice(b", ");
        }
        write_string(out, name.as_ref());
        out.extend_from_slice(b": ");
        write(out, field);
    }
    out.push(b'}');
}

fn write_scalar(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::String(text) => write_string(out, text),
        Value::Number(number) => out.extend_from_slice(number_text(number).as_bytes()),
        Value::Bool(true) => out.extend_from_slice(b"true"),
        Value::Bool(false) => out.extend_from_slice(b"false"),
        // Arrays and objects never come here.
        _ => out.extend_from_slice(b"null"),
    }
}

/// A number as Python writes it.
pub fn number_text(number: &Number) -> String {
    match number.as_f64() {
        Some(float) if number.is_f64() => float_text(float),
        _ => number.to_string(),
    }
}

/// `repr(float)`: the shortest digits that read back as the same number, with an exponent below 1e-4 and from 1e16.
pub fn float_text(float: f64) -> String {
    if float.is_nan() {
        return "NaN".into();
    }
    if float.is_infinite() {
        return if float > 0.0 { "Infinity".into() } else { "-Infinity".into() };
    }
    let scientific = format!("{float:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if float != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{mantissa}e{sign}{:02}", exponent.abs());
    }
    let plain = format!("{float}");
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// `str(value)`: what an f-string shows. Strings as they are; lists and objects as Python literals.
pub fn python_str(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => {
            let mut out = String::new();
            write_repr(&mut out, other);
            out
        }
    }
}

/// Whether Python takes `value` for true: not null, false, zero or empty.
pub fn is_truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(b) => *b,
        Value::Number(n) => n.as_f64() != Some(0.0),
        Value::String(s) => !s.is_empty(),
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
    }
}

fn write_repr(out: &mut String, value: &Value) {
    match value {
        Value::Null => out.push_str("None"),
        Value::Bool(true) => out.push_str("True"),
        Value::Bool(false) => out.push_str("False"),
        Value::Number(n) => match n.as_f64() {
            Some(f) if n.is_f64() && f.is_infinite() => out.push_str(if f > 0.0 { "inf" } else { "-inf" }),
            _ => out.push_str(&number_text(n)),
        },
        Value::String(text) => write_string_repr(out, text),
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                write_repr(out, item);
            }
            out.push(']');
        }
        Value::Object(fields) => {
            out.push('{');
            for (i, (name, field)) in fields.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                write_string_repr(out, name);
                out.push_str(": ");
                write_repr(out, field);
            }
            out.push('}');
        }
    }
}

/// `repr(str)`: single quotes unless the text holds some and no double ones. Printable characters beyond ASCII stay;
/// of the unprintable ones the separators, the only ones seen in catalogues, are escaped as Python does.
fn write_string_repr(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if (c.is_control() || c.is_whitespace() || is_format(c)) && c != ' ' => {
                let code = u32::from(c);
                if code <= 0xff {
                    out.push_str(&format!("\\x{code:02x}"));
                } else {
                    out.push_str(&format!("\\u{code:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// Invisible formatting characters of the basic plane, which Python's `repr` escapes.
fn is_format(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn line(value: &Value) -> String {
        let mut out = Vec::new();
        write_line(&mut out, value);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn floats_read_as_python_writes_them() {
        // Taken from CPython 3.11.
        for (float, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (123_456_789.0, "123456789.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.2345e22, "1.2345e+22"),
            (0.544_229_225_295_951_9, "0.5442292252959519"),
            (f64::MAX, "1.7976931348623157e+308"),
            (5e-324, "5e-324"),
        ] {
            assert_eq!(float_text(float), text);
        }
    }

    #[test]
    fn strings_are_escaped_as_python_does_without_ascii() {
        assert_eq!(
            line(&json!({"a": "q\" b\\ n\n r\r t\t f\u{c} b\u{8} c\u{1} d\u{7f} é \u{2028} /"})),
            "{\"a\": \"q\\\" b\\\\ n\\n r\\r t\\t f\\f b\\b c\\u0001 d\u{7f} é \u{2028} /\"}"
        );
    }

    #[test]
    fn lines_have_spaces_after_separators() {
        assert_eq!(
            line(&json!([1, {"a": null, "b": [true, false]}, [], {}])),
            r#"[1, {"a": null, "b": [true, false]}, [], {}]"#
        );
    }

    #[test]
    fn pretty_layout_has_two_spaces_and_compact_empties() {
        let mut out = Vec::new();
        write_pretty(&mut out, &json!({"a": [1, []], "b": {}}), 0);
        assert_eq!(String::from_utf8(out).unwrap(), "{\n  \"a\": [\n    1,\n    []\n  ],\n  \"b\": {}\n}");
    }

    #[test]
    fn values_show_as_in_an_f_string() {
        // Taken from CPython 3.11.
        assert_eq!(python_str(&json!("plain 'text'")), "plain 'text'");
        assert_eq!(
            python_str(&json!(["it's", "a \"b\"", "both ' \"", "n\n\u{a0}\u{2028}\u{1}é\\"])),
            r#"["it's", 'a "b"', 'both \' "', 'n\n\xa0\u2028\x01é\\']"#
        );
        assert_eq!(python_str(&json!({"a": null, "b": true, "c": 1e16})), "{'a': None, 'b': True, 'c': 1e+16}");
    }
}
