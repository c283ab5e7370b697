//! The plain texts of a Python script: string literals, joined by nothing or by `+`, that are all of what is assigned
//! to a name (`x = …`), to a key (`d["x"] = …`), or is a key's value in a dictionary.
//!
//! This is no parser of Python: it knows comments, strings (with their prefixes, escapes and formatted fields) and
//! brackets, which is enough to find texts and never to take code for one.

/// A text and what it is assigned to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assigned {
    pub target: String,
    pub parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    Text(String),
    /// A field's expression, without conversion and format.
    Field(String),
}

/// The script ends inside a string, or a string has an escape that is not understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    pub line: u64,
    pub message: String,
}

/// All plain texts, in the order of the script.
///
/// # Errors
/// See [`Wrong`].
pub fn assigned(source: &str) -> Result<Vec<Assigned>, Wrong> {
    let tokens = tokens(&source.replace("\r\n", "\n"))?;
    let mut found = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        let before = |n: usize| i.checked_sub(n).map(|j| &tokens[j]);
        let target = match (token, before(1), before(2)) {
            (Token::Symbol('='), Some(Token::Name(name)), _) => name,
            (Token::Symbol('='), Some(Token::Symbol(']')), Some(Token::Text(parts)))
            | (Token::Symbol(':'), Some(Token::Text(parts)), _) => match parts.as_slice() {
                [Part::Text(key)] => key,
                _ => continue,
            },
            _ => continue,
        };
        if let Some(parts) = plain_text(&tokens[i + 1..]) {
            found.push(Assigned { target: target.clone(), parts });
        }
    }
    Ok(found)
}

/// The text that `tokens` begin with, if nothing else belongs to the expression.
fn plain_text(tokens: &[Token]) -> Option<Vec<Part>> {
    let mut parts = Vec::new();
    let mut depth = 0usize;
    let mut wants_more = true;
    for token in tokens {
        match token {
            Token::Text(more) => {
                parts.extend(more.iter().cloned());
                wants_more = false;
            }
            Token::Symbol('(') if wants_more => depth += 1,
            Token::Symbol('+') if !wants_more => wants_more = true,
            Token::Symbol(')') if depth > 0 && !wants_more => depth -= 1,
            Token::LineEnd if depth > 0 || wants_more => {
                if depth == 0 {
                    return None;
                }
            }
            Token::LineEnd | Token::Symbol(',' | '}' | ')' | ';') if depth == 0 => break,
            _ => return None,
        }
    }
    (!parts.is_empty() && !wants_more && depth == 0).then(|| merged(parts))
}

fn merged(parts: Vec<Part>) -> Vec<Part> {
    let mut merged: Vec<Part> = Vec::new();
    for part in parts {
        match (merged.last_mut(), part) {
            (Some(Part::Text(text)), Part::Text(more)) => text.push_str(&more),
            (_, part) => merged.push(part),
        }
    }
    merged
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Name(String),
    Text(Vec<Part>),
    Symbol(char),
    LineEnd,
}

struct Reader<'a> {
    source: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a str {
        &self.source[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn take_while(&mut self, fits: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|c| !fits(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    fn skip(&mut self, text: &str) -> bool {
        let there = self.rest().starts_with(text);
        self.at += if there { text.len() } else { 0 };
        there
    }

    fn wrong(&self, at: usize, message: impl Into<String>) -> Wrong {
        let line = self.source[..at].bytes().filter(|b| *b == b'\n').count() as u64 + 1;
        Wrong { line, message: message.into() }
    }
}

fn tokens(source: &str) -> Result<Vec<Token>, Wrong> {
    let mut reader = Reader { source, at: 0 };
    let mut tokens = Vec::new();
    while let Some(c) = reader.peek() {
        match c {
            '#' => {
                reader.take_while(|c| c != '\n');
            }
            '\n' => {
                reader.next();
                tokens.push(Token::LineEnd);
            }
            '\\' => {
                reader.next();
                reader.skip("\n");
            }
            '"' | '\'' => tokens.push(Token::Text(string(&mut reader, "")?)),
            c if c.is_alphabetic() || c == '_' => {
                let name = reader.take_while(|c| c.is_alphanumeric() || c == '_');
                let is_prefix = name.len() <= 2 && name.chars().all(|c| "rRbBuUfF".contains(c));
                tokens.push(match reader.peek() {
                    Some('"' | '\'') if is_prefix => Token::Text(string(&mut reader, name)?),
                    _ => Token::Name(name.to_owned()),
                });
            }
            // `==`, `+=` and their kin assign no text.
            '=' | '+' | '-' | '*' | '/' | '<' | '>' | '!' | ':' | '|' | '&' | '%' | '^' | '@' => {
                let run = reader.take_while(|c| "=+-*/<>!:|&%^@".contains(c));
                let mut only = run.chars();
                tokens.push(Token::Symbol(match (only.next(), only.next()) {
                    (Some(one), None) => one,
                    _ => '?',
                }));
            }
            c if c.is_whitespace() => {
                reader.next();
            }
            c => {
                reader.next();
                tokens.push(Token::Symbol(c));
            }
        }
    }
    Ok(tokens)
}

/// A string literal whose prefix has been read.
fn string(reader: &mut Reader, prefix: &str) -> Result<Vec<Part>, Wrong> {
    let start = reader.at;
    let has = |c: char| prefix.to_ascii_lowercase().contains(c);
    let (raw, formatted) = (has('r'), has('f'));
    let quote = ["\"\"\"", "'''", "\"", "'"].into_iter().find(|q| reader.skip(q)).unwrap_or("\"");
    let mut parts = Vec::new();
    let mut text = String::new();
    loop {
        if reader.skip(quote) {
            if !text.is_empty() || parts.is_empty() {
                parts.push(Part::Text(text));
            }
            return Ok(parts);
        }
        let at = reader.at;
        let Some(c) = reader.next() else { return Err(reader.wrong(start, "a text without an end")) };
        match c {
            '\n' if quote.len() == 1 => return Err(reader.wrong(start, "a text without an end on its line")),
            '\\' if raw => {
                text.push('\\');
                text.extend(reader.next());
            }
            '\\' => escape(reader, at, &mut text)?,
            '{' | '}' if formatted && reader.peek() == Some(c) => {
                reader.next();
                text.push(c);
            }
            '{' if formatted => {
                if !text.is_empty() {
                    parts.push(Part::Text(std::mem::take(&mut text)));
                }
                parts.push(Part::Field(field(reader, at)?));
            }
            c => text.push(c),
        }
    }
}

/// The character that a backslash at `at` begins.
fn escape(reader: &mut Reader, at: usize, text: &mut String) -> Result<(), Wrong> {
    let Some(c) = reader.next() else { return Err(reader.wrong(at, "a text without an end")) };
    let digits = match c {
        '\n' => return Ok(()),
        'x' => 2,
        'u' => 4,
        'U' => 8,
        'N' => return Err(reader.wrong(at, "a character by its name, which is not understood here")),
        '0'..='7' => {
            let octal: String = reader.rest().chars().take(2).take_while(|c| c.is_digit(8)).collect();
            reader.at += octal.len();
            let number = u32::from_str_radix(&format!("{c}{octal}"), 8).unwrap_or(0);
            text.extend(char::from_u32(number));
            return Ok(());
        }
        _ => {
            let plain = match c {
                'n' => '\n',
                't' => '\t',
                'r' => '\r',
                'a' => '\u{7}',
                'b' => '\u{8}',
                'f' => '\u{c}',
                'v' => '\u{b}',
                '\\' | '\'' | '"' => c,
                other => {
                    // Python keeps the backslash of what is no escape.
                    text.push('\\');
                    other
                }
            };
            text.push(plain);
            return Ok(());
        }
    };
    let number = reader.rest().get(..digits).and_then(|hex| u32::from_str_radix(hex, 16).ok());
    let Some(c) = number.and_then(char::from_u32) else { return Err(reader.wrong(at, "not a character's number")) };
    reader.at += digits;
    text.push(c);
    Ok(())
}

/// The expression of a field whose brace has been read, up to its closing brace.
fn field(reader: &mut Reader, start: usize) -> Result<String, Wrong> {
    let from = reader.at;
    let (mut depth, mut end) = (0usize, None);
    while let Some(c) = reader.peek() {
        let at = reader.at;
        match c {
            '"' | '\'' if end.is_none() => {
                string(reader, "")?;
                continue;
            }
            '(' | '[' | '{' => depth += 1,
            '}' if depth == 0 => {
                reader.next();
                return Ok(reader.source[from..end.unwrap_or(at)].trim().to_owned());
            }
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            ':' if depth == 0 => end = end.or(Some(at)),
            '!' if depth == 0 && !reader.rest().starts_with("!=") => end = end.or(Some(at)),
            _ => {}
        }
        reader.next();
    }
    Err(reader.wrong(start, "a field without an end"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(source: &str) -> Vec<(String, String)> {
        let show = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            Part::Field(expression) => format!("<{expression}>"),
        };
        let found = assigned(source).unwrap().into_iter();
        found.map(|a| (a.target, a.parts.iter().map(show).collect())).collect()
    }

    fn one(source: &str) -> String {
        let found = text(source);
        assert_eq!(found.len(), 1, "{source}: {found:?}");
        found[0].1.clone()
    }

    #[test]
    fn literals_are_read_as_python_reads_them() {
        assert_eq!(one(r#"x = "a\tb\\ \"q\" \x41\u00e9\U0001F600\101\d""#), "a\tb\\ \"q\" Aé😀A\\d");
        assert_eq!(one("x = 'it''s' \"so\""), "itsso");
        assert_eq!(one("x = r'\\n{a}'"), "\\n{a}");
        assert_eq!(one("x = '''a\r\n\"b\" 'c' \\\n d'''"), "a\n\"b\" 'c'  d");
        assert_eq!(one("x = (\n  'a'  # one\n\n  + 'b'\n)"), "ab");
        assert_eq!(one("x = 'a' + \\\n    'b'"), "ab");
        assert_eq!(one("x = ''"), "");
    }

    #[test]
    fn fields_are_cut_out_of_formatted_texts_only() {
        assert_eq!(one("x = f'{a}b{{c}}{d[\"e\"]:.3f}{f!r}{g(h, {1: 2})}'"), "<a>b{c}<d[\"e\"]><f><g(h, {1: 2})>");
        assert_eq!(one("x = '{a}'"), "{a}");
        assert_eq!(one("x = f'{a != b}'"), "<a != b>");
        assert_eq!(one("x = Rf'\\n{a}'"), "\\n<a>");
    }

    #[test]
    fn targets_are_names_keys_and_dictionaries() {
        let found = text("a = 'A'\nd['k'] = 'B'\ne = {'m': 'C', \"n\": 1, 'o': ('D')}\nself.p = 'E'\nf(q='F')");
        let pairs: Vec<(&str, &str)> = found.iter().map(|(t, x)| (t.as_str(), x.as_str())).collect();
        assert_eq!(pairs, [("a", "A"), ("k", "B"), ("m", "C"), ("o", "D"), ("p", "E"), ("q", "F")]);
    }

    #[test]
    fn what_is_more_than_a_text_is_none() {
        for source in [
            "x = 'a' + y",
            "x = 'a'.join(y)",
            "x = ', '.join(['a'])",
            "x += 'a'",
            "x == 'a'",
            "x = ['a']",
            "# x = 'a'",
            "'''x = \"a\"'''",
            "x = y = 1",
            "x = 'a' if y else 'b'",
            "x = 'a' % y",
            "x =",
        ] {
            assert_eq!(text(source), [], "{source}");
        }
    }

    #[test]
    fn broken_scripts_are_placed() {
        let wrong = |source: &str| assigned(source).unwrap_err();
        assert_eq!(wrong("a = 1\nx = 'a\n").line, 2);
        assert_eq!(wrong("\n\nx = '''a\n").line, 3);
        assert_eq!(wrong("x = f'{a'").message, "a text without an end");
        assert_eq!(wrong("x = f'{a(").message, "a field without an end");
        assert_eq!(wrong("x = '\\u12'").message, "not a character's number");
        assert_eq!(wrong("x = '\\N{DOG}'").line, 1);
    }
}
