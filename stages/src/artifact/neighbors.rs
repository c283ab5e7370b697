//! `neighbors`: the most similar items of each item, best first.
//!
//! Two forms are read and written: JSON Lines of [`Neighbors`], and the published one, an object item → list of
//! `{item_id, similarity}`.

use std::{collections::HashSet, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{ItemId, Neighbor, Neighbors, jsonl, python_json, text};
use crate::StageError;

/// A neighbour as the published file has it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Similar {
    item_id: ItemId,
    similarity: f64,
}

/// Reads either form, in the file's order.
///
/// # Errors
/// The file cannot be read, is neither form, or has one item twice. It may hold no item at all.
pub fn read(path: &Path) -> Result<Vec<Neighbors>, StageError> {
    let text = text::read(path)?;
    let first = text.lines().find(|l| !l.trim().is_empty()).unwrap_or_default();
    let is_object = !first.trim_start().starts_with("{\"id\":") && serde_json::from_str::<Neighbors>(first).is_err();
    let all: Vec<Neighbors> = if is_object && !first.is_empty() {
        let entries: Map<String, Value> =
            serde_json::from_str(&text).map_err(|e| text::json_error(path, &e, "neighbours"))?;
        let read = |(id, similar): (String, Value)| {
            let similar: Vec<Similar> = serde_json::from_value(similar)
                .map_err(|e| StageError::input(path, format!("the neighbours of item `{id}`: {e}")))?;
            let neighbors = similar.into_iter().map(|s| Neighbor { id: s.item_id, score: s.similarity }).collect();
            Ok(Neighbors { id: ItemId(id), neighbors })
        };
        entries.into_iter().map(read).collect::<Result<_, StageError>>()?
    } else {
        jsonl::read(path)?
    };
    let mut seen = HashSet::new();
    match all.iter().find(|n| !seen.insert(&n.id)) {
        Some(twice) => Err(StageError::input(path, format!("item `{}` has neighbours twice", twice.id))),
        None => Ok(all),
    }
}

/// Writes the published form.
///
/// # Errors
/// The file cannot be written.
pub fn write_reference(path: &Path, all: &[Neighbors]) -> Result<(), StageError> {
    let entries: Map<String, Value> = all
        .iter()
        .map(|of| {
            let similar = |n: &Neighbor| json!({"item_id": n.id, "similarity": n.score});
            (of.id.0.clone(), Value::Array(of.neighbors.iter().map(similar).collect()))
        })
        .collect();
    let mut out = Vec::new();
    python_json::write_pretty(&mut out, &Value::Object(entries), 0);
    std::fs::write(path, out).map_err(|e| StageError::io("write", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Vec<Neighbors>, StageError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("n");
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn both_forms_read_the_same() {
        let lines = "{\"id\":\"1\",\"neighbors\":[{\"id\":\"2\",\"score\":0.5}]}\n{\"id\":\"2\",\"neighbors\":[]}\n";
        let all = read_text(lines).unwrap();
        assert_eq!(all, read_text(r#"{"1": [{"item_id": "2", "similarity": 0.5}], "2": []}"#).unwrap());
        let folder = tempfile::tempdir().unwrap();
        write_reference(&folder.path().join("n"), &all).unwrap();
        assert_eq!(read(&folder.path().join("n")).unwrap(), all);
        assert!(read_text("").unwrap().is_empty());
        assert!(read_text("{}").unwrap().is_empty());
    }

    #[test]
    fn bad_files_are_refused() {
        for (text, words) in [
            ("{\"id\":\"1\",\"neighbors\":[]}\n{\"id\":\"1\",\"neighbors\":[]}", "`1` has neighbours twice"),
            ("{\"id\":\"1\",\"neighbors\":[{\"id\":", "n:1: not a valid record"),
            ("{\n\"1\": [{\"item_id\": \"2\"", "n:2: not neighbours"),
            ("{\"1\": [{\"item_id\": \"2\"}]}", "neighbours of item `1`: missing field `similarity`"),
            ("[]", "n:1: not neighbours"),
        ] {
            let error = read_text(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text:?}: {error}");
        }
    }
}
