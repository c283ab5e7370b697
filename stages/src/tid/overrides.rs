//! The user's own answers: a JSON object, item id → five words, as a list or as a text `[a, b, c, d, e]`.

use std::path::Path;

use rustc_hash::FxHashMap;
use serde_json::{Map, Value};

use super::parse;
use crate::{
    StageError,
    artifact::{ItemId, TID_LENGTH, text},
};

/// Reads and checks the overrides. Words of several parts are hyphenated; nothing else is changed.
///
/// # Errors
/// The file is no such object, names an item that `known` does not, or an answer is not five words; all mistakes at
/// once.
pub fn read(
    path: &Path,
    known: impl Fn(&ItemId) -> bool,
) -> Result<FxHashMap<ItemId, [String; TID_LENGTH]>, StageError> {
    let entries: Map<String, Value> = serde_json::from_str(&text::read(path)?)
        .map_err(|e| text::json_error(path, &e, "an object item id → five words"))?;
    let (mut overrides, mut mistakes) = (FxHashMap::default(), Vec::new());
    for (id, answer) in entries {
        let id = ItemId(id);
        if !known(&id) {
            mistakes.push(format!("item `{id}` is not in the catalogue"));
            continue;
        }
        match words(&answer) {
            Ok(words) => {
                overrides.insert(id, words);
            }
            Err(message) => mistakes.push(format!("item `{id}`: {message}")),
        }
    }
    if mistakes.is_empty() {
        return Ok(overrides);
    }
    let (shown, more) =
        (mistakes.iter().take(10).cloned().collect::<Vec<_>>().join("; "), mistakes.len().saturating_sub(10));
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    Err(StageError::input(path, shown + &more)
        .help("write `\"ID\": [\"word\", \"word\", \"word\", \"word\", \"word\"]`, words without commas or brackets"))
}

fn words(answer: &Value) -> Result<[String; TID_LENGTH], String> {
    let parts: Vec<&str> = match answer {
        Value::Array(parts) => {
            parts.iter().map(|p| p.as_str().ok_or("a word is not a string")).collect::<Result<_, _>>()?
        }
        Value::String(text) => text.trim().trim_start_matches('[').trim_end_matches(']').split(',').collect(),
        _ => return Err("neither a list of words nor a text".into()),
    };
    let words: Vec<String> = parts.iter().map(|p| p.split_whitespace().collect::<Vec<_>>().join("-")).collect();
    if let Some(bad) = words.iter().find(|w| w.contains(['[', ']', ','])) {
        return Err(format!("`{bad}` holds a comma or a bracket"));
    }
    if words.iter().any(|w| parse::clean(w).is_empty()) {
        return Err("a word is blank".into());
    }
    <[String; TID_LENGTH]>::try_from(words).map_err(|w| format!("{} words instead of {TID_LENGTH}", w.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<FxHashMap<ItemId, [String; TID_LENGTH]>, StageError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("o.json");
        std::fs::write(&path, text).unwrap();
        read(&path, |id| ["1", "2", "3", "4"].contains(&id.as_str()))
    }

    #[test]
    fn lists_and_texts() {
        let read = read_text(r#"{"1": ["a", "b c", "d", "e", "F"], "2": "[a, b, c, d, 20%]"}"#).unwrap();
        assert_eq!(read[&ItemId("1".into())].join(" "), "a b-c d e F");
        assert_eq!(read[&ItemId("2".into())].join(" "), "a b c d 20%");
    }

    #[test]
    fn all_mistakes_at_once() {
        let error =
            read_text(r#"{"9": "a,b,c,d,e", "1": ["a"], "2": "a,b,c,d, ", "3": [1], "4": ["a]", "b", "c", "d", "e"]}"#);
        let error = error.unwrap_err().to_string();
        for words in
            ["`9` is not in", "`1`: 1 words instead", "`2`: a word is blank", "`3`: a word is not", "`a]` holds"]
        {
            assert!(error.contains(words), "{words}: {error}");
        }
        assert!(read_text("[]").unwrap_err().to_string().contains("o.json:1: not an object"));
    }
}
