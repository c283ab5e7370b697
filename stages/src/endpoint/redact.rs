//! Keeping a key out of messages, however a server writes it.

/// Stands where the key was.
const BLANK: &str = "***";

/// `text` without `key`; nothing of it where it holds the key as JSON or an address would write it.
pub fn without(text: String, key: &str) -> String {
    let text = text.replace(key, BLANK);
    if unescaped(&text).contains(key) {
        format!("(what was said repeats the key, written otherwise: {BLANK})")
    } else {
        text
    }
}

/// `\/`, `\"`, `\\`, `\u002f` and `%2F` as the characters that they stand for; all else as it is.
fn unescaped(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(['\\', '%']) {
        plain.push_str(&rest[..at]);
        let (character, length) = escape(&rest[at..]).unwrap_or_else(|| (rest[at..].chars().next().unwrap_or('%'), 1));
        plain.push(character);
        rest = &rest[at + length..];
    }
    plain + rest
}

/// The character that an escape at the beginning stands for, and the escape's length.
fn escape(text: &str) -> Option<(char, usize)> {
    let number = |digits: Option<&str>| char::from_u32(u32::from_str_radix(digits?, 16).ok()?);
    match text.get(..2)? {
        "\\u" => Some((number(text.get(2..6))?, 6)),
        two if two.starts_with('%') => Some((number(text.get(1..3))?, 3)),
        "\\/" | "\\\"" | "\\\\" => Some((text[1..].chars().next()?, 2)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_however_it_is_written() {
        let key = "sk-a/b\"c%d";
        assert_eq!(without(format!("bad {key}, {key}"), key), "bad ***, ***");
        for written in [r#"sk-a\/b\"c%d"#, r"sk-a\u002fb\u0022c%d", "sk-a%2Fb%22c%25d", r#"sk-a/b\"c%d"#] {
            let said = without(format!("{{\"detail\": \"bad Bearer {written}\"}}"), key);
            assert!(!said.contains("sk-"), "{said}");
        }
        for harmless in ["100% of \\ and %zz", "é%", "\\", "\\u12", "nothing"] {
            assert_eq!(without(harmless.to_owned(), key), harmless);
        }
    }
}
