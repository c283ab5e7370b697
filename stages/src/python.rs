//! Python string literals: as the text of a script, and inside lists that were once turned into strings.
//!
//! Only literals: no names, no evaluation. What a script's literals are for is `import_prompts`' business.

/// A piece of a string literal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    Text(String),
    /// What stands between the braces of an f-string, as written.
    Expression(String),
}

/// Reads the string literal at the start of `source`, prefix included; gives its parts and what comes after it.
/// `None` if there is none, or it has no end.
pub fn string_literal(source: &str) -> Option<(Vec<Part>, &str)> {
    let prefix_end = source.find(['"', '\''])?;
    let prefix = &source[..prefix_end];
    if prefix_end > 2 || !prefix.chars().all(|c| "rRbBuUfF".contains(c)) {
        return None;
    }
    let has = |flag: char| prefix.contains([flag, flag.to_ascii_uppercase()]);
    let body = &source[prefix_end..];
    let close = if body.starts_with("\"\"\"") || body.starts_with("'''") { &body[..3] } else { &body[..1] };
    let triple = close.len() == 3;
    let mut rest = &body[close.len()..];
    let (mut parts, mut text) = (Vec::new(), String::new());
    loop {
        if let Some(after) = rest.strip_prefix(close) {
            if !text.is_empty() || parts.is_empty() {
                parts.push(Part::Text(text));
            }
            return Some((parts, after));
        }
        let c = rest.chars().next()?;
        let after = &rest[c.len_utf8()..];
        rest = match c {
            '\n' if !triple => return None,
            '\\' if has('r') => {
                let next = after.chars().next()?;
                text.push('\\');
                text.push(next);
                &after[next.len_utf8()..]
            }
            '\\' => escape(after, &mut text)?,
            '{' | '}' if has('f') && after.starts_with(c) => {
                text.push(c);
                &after[1..]
            }
            '{' if has('f') => {
                let end = expression_end(after)?;
                if !text.is_empty() {
                    parts.push(Part::Text(std::mem::take(&mut text)));
                }
                parts.push(Part::Expression(after[..end].to_owned()));
                &after[end + 1..]
            }
            c => {
                text.push(c);
                after
            }
        };
    }
}

/// Reads a list of strings, such as `['a', "b"]`, that makes up all of `text`; lists inside it are flattened, `None`
/// in it is passed over. `None` if `text` is something else.
pub fn string_list(text: &str) -> Option<Vec<String>> {
    let mut strings = Vec::new();
    let rest = list(text.trim(), &mut strings, 0)?;
    rest.is_empty().then_some(strings)
}

fn list<'a>(text: &'a str, strings: &mut Vec<String>, depth: usize) -> Option<&'a str> {
    // Deeper nesting than any catalogue's is garbage.
    let close = match text.chars().next()? {
        _ if depth > 16 => return None,
        '[' => ']',
        '(' => ')',
        _ => return None,
    };
    let mut rest = text[1..].trim_start();
    loop {
        if let Some(after) = rest.strip_prefix(close) {
            return Some(after);
        }
        rest = if rest.starts_with(['[', '(']) {
            list(rest, strings, depth + 1)?
        } else if let Some(after) = rest.strip_prefix("None") {
            after
        } else {
            let (parts, after) = string_literal(rest)?;
            for part in parts {
                match part {
                    Part::Text(text) => strings.push(text),
                    Part::Expression(_) => return None,
                }
            }
            after
        }
        .trim_start();
        rest = match rest.strip_prefix(',') {
            Some(after) => after.trim_start(),
            None if rest.starts_with(close) => rest,
            None => return None,
        };
    }
}

/// Appends what the escape after a backslash stands for; an unknown one stays as it is.
fn escape<'a>(after: &'a str, text: &mut String) -> Option<&'a str> {
    let c = after.chars().next()?;
    let rest = &after[c.len_utf8()..];
    let digits = match c {
        'x' => 2,
        'u' => 4,
        'U' => 8,
        _ => 0,
    };
    if digits > 0 {
        let code = rest.get(..digits).and_then(|hex| u32::from_str_radix(hex, 16).ok())?;
        text.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
        return Some(&rest[digits..]);
    }
    if c.is_digit(8) {
        let len = after.bytes().take(3).take_while(|b| (b'0'..=b'7').contains(b)).count();
        let code = u32::from_str_radix(&after[..len], 8).ok()?;
        text.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
        return Some(&after[len..]);
    }
    match c {
        '\n' => {}
        'n' => text.push('\n'),
        'r' => text.push('\r'),
        't' => text.push('\t'),
        'a' => text.push('\u{7}'),
        'b' => text.push('\u{8}'),
        'f' => text.push('\u{c}'),
        'v' => text.push('\u{b}'),
        '\\' | '\'' | '"' => text.push(c),
        other => {
            text.push('\\');
            text.push(other);
        }
    }
    Some(rest)
}

/// Where the expression of an f-string ends: at the brace that is not inside brackets or a string of its own.
fn expression_end(source: &str) -> Option<usize> {
    let mut depth = 0usize;
    let mut quote = None;
    for (i, c) in source.char_indices() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'') => quote = Some(c),
            (None, '(' | '[' | '{') => depth += 1,
            (None, '}') if depth == 0 => return Some(i),
            (None, ')' | ']' | '}') => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(source: &str) -> Option<String> {
        match &string_literal(source)?.0[..] {
            [Part::Text(text)] => Some(text.clone()),
            _ => None,
        }
    }

    #[test]
    fn literals_are_decoded_as_python_decodes_them() {
        for (source, value) in [
            (r"'it\'s'", "it's"),
            (r#""a\tb\x41\u00e9\101\q""#, "a\tbAéA\\q"),
            ("'''a'b\n\"c\"'''", "a'b\n\"c\""),
            (r"r'\n\''", r"\n\'"),
            ("'a\\\nb'", "ab"),
            ("''", ""),
        ] {
            assert_eq!(text(source).as_deref(), Some(value), "{source}");
        }
        for source in ["'a", "'a\nb'", "x'a'", "a", "'\\x4'", ""] {
            assert_eq!(text(source), None, "{source}");
        }
    }

    #[test]
    fn f_strings_fall_into_parts() {
        let (parts, rest) = string_literal("f\"{{a}} {x['}']:.3f}{d(1, {})} b\" + c").unwrap();
        let expression = |e: &str| Part::Expression(e.into());
        assert_eq!(
            parts,
            [Part::Text("{a} ".into()), expression("x['}']:.3f"), expression("d(1, {})"), Part::Text(" b".into())]
        );
        assert_eq!(rest, " + c");
    }

    #[test]
    fn lists_of_strings_are_read_whole_or_not_at_all() {
        let strings = |text: &str| string_list(text);
        assert_eq!(strings(r#" ['a', "b's", None, ['c'],] "#), Some(vec!["a".into(), "b's".into(), "c".into()]));
        assert_eq!(strings("[]"), Some(vec![]));
        for text in ["", "a", "['a'", "['a'] b", "[a]", "['a' 'b']", "[Value Pack]", "[1]"] {
            assert_eq!(strings(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(source in "[\\[\\]'\"\\\\{}fr a-c,\nxuU0-9é]{0,40}") {
            let _ = (string_literal(&source), string_list(&source));
        }
    }
}
