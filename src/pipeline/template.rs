//! `${…}` in text: finding references, and putting shell-quoted paths into the `run` of a `command`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// A piece of text with references.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece<'t> {
    Text(&'t str),
    /// `$${`, which stands for `${`.
    Escaped,
    /// What stands between `${` and `}`.
    Reference(&'t str),
    /// `${` without an end.
    Unclosed(&'t str),
}

/// Splits text at its references.
pub(crate) fn pieces(text: &str) -> impl Iterator<Item = Piece<'_>> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        if let Some(after) = rest.strip_prefix("$${") {
            rest = after;
            return Some(Piece::Escaped);
        }
        if let Some(after) = rest.strip_prefix("${") {
            let Some(end) = after.find('}') else {
                return Some(Piece::Unclosed(std::mem::take(&mut rest)));
            };
            rest = &after[end + 1..];
            return Some(Piece::Reference(&after[..end]));
        }
        let end = match rest.find("${") {
            Some(at) if rest[..at].ends_with('$') => at - 1,
            Some(at) => at,
            None => rest.len(),
        };
        let (text, after) = rest.split_at(end);
        rest = after;
        Some(Piece::Text(text))
    })
}

/// A port that a `run` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PortReference<'t> {
    Input(&'t str),
    Output(&'t str),
}

pub(crate) fn port_reference(reference: &str) -> Option<PortReference<'_>> {
    match reference.trim().split_once('.') {
        Some(("inputs", port)) => Some(PortReference::Input(port)),
        Some(("outputs", port)) => Some(PortReference::Output(port)),
        _ => None,
    }
}

/// Why a `run` could not be completed. Loading a pipeline finds these mistakes first.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SubstituteError {
    #[error("`${{{0}}}` names no port of this stage")]
    UnknownPort(String),
    #[error("`${{` without `}}` in `{0}`")]
    Unclosed(String),
    #[error("the path `{}` is not UTF-8", .0.display())]
    NotUtf8(PathBuf),
}

/// Puts shell-quoted paths in place of `${inputs.x}` and `${outputs.x}`; `$${` becomes `${`.
///
/// # Errors
/// The text names an unknown port, or a path cannot be written into it.
pub fn substitute(
    run: &str,
    inputs: &BTreeMap<String, PathBuf>,
    outputs: &BTreeMap<String, PathBuf>,
) -> Result<String, SubstituteError> {
    let mut out = String::with_capacity(run.len() + 64);
    for piece in pieces(run) {
        match piece {
            Piece::Text(text) => out.push_str(text),
            Piece::Escaped => out.push_str("${"),
            Piece::Unclosed(text) => return Err(SubstituteError::Unclosed(text.to_owned())),
            Piece::Reference(reference) => {
                let path = match port_reference(reference) {
                    Some(PortReference::Input(port)) => inputs.get(port),
                    Some(PortReference::Output(port)) => outputs.get(port),
                    None => None,
                };
                let path = path.ok_or_else(|| SubstituteError::UnknownPort(reference.to_owned()))?;
                out.push_str(&shell_quoted(path)?);
            }
        }
    }
    Ok(out)
}

/// As one word of a POSIX shell.
fn shell_quoted(path: &Path) -> Result<String, SubstituteError> {
    let text = path.to_str().ok_or_else(|| SubstituteError::NotUtf8(path.to_owned()))?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:,@%".contains(c);
    // A leading dash would be read as an option by most programs; `./` keeps it a path.
    let text = if text.starts_with('-') { format!("./{text}") } else { text.to_owned() };
    if !text.is_empty() && text.chars().all(plain) {
        return Ok(text);
    }
    Ok(format!("'{}'", text.replace('\'', r"'\''")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_text() {
        let all: Vec<_> = pieces("a ${x} $$${y} $${z} $5 ${").collect();
        assert_eq!(
            all,
            [
                Piece::Text("a "),
                Piece::Reference("x"),
                Piece::Text(" $"),
                Piece::Escaped,
                Piece::Text("y} "),
                Piece::Escaped,
                Piece::Text("z} $5 "),
                Piece::Unclosed("${"),
            ]
        );
    }

    #[test]
    fn paths_are_quoted_for_the_shell() {
        let inputs = BTreeMap::from([("a".to_owned(), PathBuf::from("/x/it's here")), ("b".into(), "/plain".into())]);
        let outputs = BTreeMap::from([("out".to_owned(), PathBuf::from("-o;rm"))]);
        assert_eq!(
            substitute("cat ${inputs.a} ${inputs.b} > ${outputs.out}; echo $${HOME} $HOME", &inputs, &outputs),
            Ok(r"cat '/x/it'\''s here' /plain > './-o;rm'; echo ${HOME} $HOME".to_owned())
        );
        assert_eq!(
            substitute("${inputs.none}", &inputs, &outputs),
            Err(SubstituteError::UnknownPort("inputs.none".to_owned()))
        );
    }

    proptest::proptest! {
        #[test]
        fn pieces_lose_nothing(text in "[${}a.]{0,24}") {
            let whole: String = pieces(&text).map(|p| match p {
                Piece::Text(t) | Piece::Unclosed(t) => t.to_owned(),
                Piece::Escaped => "$${".to_owned(),
                Piece::Reference(r) => format!("${{{r}}}"),
            }).collect();
            proptest::prop_assert_eq!(whole, text);
        }
    }
}
