//! What the engine asks of every output before it publishes it: it is there, is a file or folder as declared, is not
//! empty, and is whole.
//!
//! Whole means: it parses to its last byte. Up to [`WHOLE`] bytes all of it is parsed; of a larger file the beginning
//! and the end, where truncation shows. Whether the content makes sense is the next stage's to find out.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    path::Path,
};

use serde::de::IgnoredAny;

use super::{Artifact, items, sequences, text};
use crate::StageError;

/// Files up to this size are parsed whole.
const WHOLE: u64 = 64 << 20;

/// How much of a larger file's beginning and end is looked at.
const PART: u64 = 1 << 20;

/// Checks an output of type `kind` at `path`.
///
/// # Errors
/// What is wrong, with the line where that is known.
pub fn check(kind: Artifact, path: &Path, may_be_empty: bool) -> Result<(), StageError> {
    check_sized(kind, path, may_be_empty, WHOLE, PART)
}

fn check_sized(kind: Artifact, path: &Path, may_be_empty: bool, whole: u64, part: u64) -> Result<(), StageError> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(StageError::input(path, "the output was not written"));
        }
        Err(e) => return Err(StageError::io("read", path, e)),
    };
    if metadata.is_dir() {
        if !kind.is_folder() && kind != Artifact::Any {
            return Err(StageError::input(path, format!("a folder, where a file ({kind}) was declared")));
        }
        let mut entries = fs::read_dir(path).map_err(|e| StageError::io("list", path, e))?;
        return if entries.next().is_some() || may_be_empty {
            Ok(())
        } else {
            Err(StageError::input(path, "the folder is empty"))
        };
    }
    if !metadata.is_file() {
        return Err(StageError::input(path, "neither a file nor a folder"));
    }
    if kind.is_folder() {
        return Err(StageError::input(path, format!("a file, where a folder ({kind}) was declared")));
    }
    if metadata.len() == 0 {
        return if may_be_empty { Ok(()) } else { Err(StageError::input(path, "the file is empty")) };
    }
    let content = content(kind);
    if matches!(content, Content::Any) {
        return Ok(());
    }
    if metadata.len() <= whole {
        return check_text(content, path, &text::read(path)?, may_be_empty);
    }
    check_ends(content, path, metadata.len(), part)
}

enum Content {
    Any,
    /// One document that starts with this character.
    Document(char),
    Json,
    Lines,
    /// A catalogue or neighbours: lines or one document.
    LinesOrDocument,
    Sequences,
    SimilarItems,
}

fn content(kind: Artifact) -> Content {
    match kind {
        Artifact::Items | Artifact::Neighbors => Content::LinesOrDocument,
        Artifact::Sequences => Content::Sequences,
        Artifact::SimilarItems => Content::SimilarItems,
        Artifact::Tids
        | Artifact::Holdout
        | Artifact::Rankings
        | Artifact::PerUser
        | Artifact::Curve
        | Artifact::JsonLines => Content::Lines,
        Artifact::Sft => Content::Document('['),
        Artifact::Id2meta
        | Artifact::DatasetInfo
        | Artifact::ItemId2tid
        | Artifact::Tid2itemId
        | Artifact::Metrics
        | Artifact::Prompts => Content::Document('{'),
        Artifact::Json => Content::Json,
        Artifact::Checkpoint | Artifact::SasrecModel | Artifact::Any => Content::Any,
    }
}

fn check_text(content: Content, path: &Path, text: &str, may_be_empty: bool) -> Result<(), StageError> {
    match content {
        Content::Any => Ok(()),
        Content::Document(open) if !text.trim_start().starts_with(open) => {
            let what = if open == '[' { "array" } else { "object" };
            Err(StageError::input_at(path, 1, format!("not a JSON {what}")))
        }
        Content::Document(_) | Content::Json => document(path, text),
        Content::Lines => json_lines(path, text, 0, may_be_empty),
        Content::LinesOrDocument => match items::form(text) {
            items::Form::Lines => json_lines(path, text, 0, may_be_empty),
            _ => document(path, text),
        },
        Content::Sequences if sequences::lines(text).any(|l| l.items().next().is_some()) || may_be_empty => Ok(()),
        Content::Sequences => Err(StageError::input(path, "holds no sequence")),
        Content::SimilarItems if sequences::similar_lines(text).next().is_some() || may_be_empty => Ok(()),
        Content::SimilarItems => Err(StageError::input(path, "holds no line after its header")),
    }
}

fn document(path: &Path, text: &str) -> Result<(), StageError> {
    serde_json::from_str::<IgnoredAny>(text).map(|_| ()).map_err(|e| text::json_error(path, &e, "valid JSON"))
}

/// `skipped` lines stand before `text`.
fn json_lines(path: &Path, text: &str, skipped: u64, may_be_empty: bool) -> Result<(), StageError> {
    let mut some = false;
    for (line, number) in text.split('\n').zip(skipped + 1..).filter(|(l, _)| !l.trim().is_empty()) {
        some = true;
        serde_json::from_str::<IgnoredAny>(line)
            .map_err(|e| StageError::input_at(path, number, format!("not valid JSON: {e}")))?;
    }
    if some || may_be_empty { Ok(()) } else { Err(StageError::input(path, "holds no record")) }
}

/// Looks at the first and the last `part` bytes of a file of `size` bytes.
fn check_ends(content: Content, path: &Path, size: u64, part: u64) -> Result<(), StageError> {
    let mut file = File::open(path).map_err(|e| StageError::io("open", path, e))?;
    let mut read = |from: u64| {
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(from))
            .and_then(|_| (&mut file).take(part).read_to_end(&mut bytes))
            .map(|_| bytes)
            .map_err(|e| StageError::io("read", path, e))
    };
    let (head, tail) = (read(0)?, read(size.saturating_sub(part))?);
    let (head, tail) = (String::from_utf8_lossy(&head), String::from_utf8_lossy(&tail));
    let (head, tail) = (head.trim_start(), tail.trim_end());
    let cut_off = |message: &str| {
        Err(StageError::input(path, message).help("it was cut off while it was written; run the stage again"))
    };
    match content {
        Content::Document(open) if !head.starts_with(open) => {
            Err(StageError::input_at(path, 1, format!("does not start with `{open}`")))
        }
        Content::Document(_) | Content::Json => {
            closed(head, tail).or_else(|()| cut_off("the JSON document has no end"))
        }
        Content::LinesOrDocument if items::form(head) != items::Form::Lines => {
            closed(head, tail).or_else(|()| cut_off("the JSON document has no end"))
        }
        Content::Lines | Content::LinesOrDocument => {
            if let Some((first, _)) = head.split_once('\n') {
                json_lines(path, first, 0, false)?;
            }
            match tail.rsplit_once('\n') {
                Some((_, last)) if serde_json::from_str::<IgnoredAny>(last).is_err() => {
                    cut_off("the last line is not valid JSON")
                }
                _ => Ok(()),
            }
        }
        Content::Sequences | Content::SimilarItems | Content::Any => Ok(()),
    }
}

/// Whether a document that starts as `head` ends as `tail`.
fn closed(head: &str, tail: &str) -> Result<(), ()> {
    let close = match head.chars().next() {
        Some('{') => '}',
        Some('[') => ']',
        _ => return Err(()),
    };
    if tail.ends_with(close) { Ok(()) } else { Err(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(kind: Artifact, content: &str, may_be_empty: bool, whole: u64) -> Result<(), String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        fs::write(&path, content).unwrap();
        check_sized(kind, &path, may_be_empty, whole, 32)
            .map_err(|e| e.to_string().rsplit_once("/").unwrap().1.to_owned())
    }

    #[test]
    fn whole_outputs_pass() {
        let long = format!("[{}1]", "1, ".repeat(50));
        let lines = "{\"a\": 1}\n".repeat(20);
        for whole in [WHOLE, 0] {
            for (kind, content) in [
                (Artifact::Sft, long.as_str()),
                (Artifact::Id2meta, "{\"a\": {}}\n"),
                (Artifact::Json, "[1]"),
                (Artifact::Rankings, lines.as_str()),
                (Artifact::Items, "{\"1\": {\"title\": \"t\"}}"),
                (Artifact::Items, lines.as_str()),
                (Artifact::Sequences, "1 2 3\n"),
                (Artifact::SimilarItems, "anchor top1\n1 2\n"),
                (Artifact::Any, "\0"),
            ] {
                assert_eq!(on(kind, content, false, whole), Ok(()), "{kind} {whole}");
            }
        }
        assert_eq!(on(Artifact::JsonLines, "", true, WHOLE), Ok(()));
    }

    #[test]
    fn truncated_and_empty_outputs_do_not() {
        for (kind, content, message) in [
            (Artifact::Sft, "", "out: the file is empty"),
            (Artifact::Sft, "{}", "out:1: not a JSON array"),
            (Artifact::Sft, "[1,\n2,\n", "out:3: not valid JSON: EOF while parsing a value at line 3 column 0"),
            (
                Artifact::Id2meta,
                "{\"a\": {}\n",
                "out:2: not valid JSON: EOF while parsing an object at line 2 column 0",
            ),
            (Artifact::Rankings, "{}\n{\"a\": ", "out:2: not valid JSON: EOF while parsing a value at line 1 column 6"),
            (Artifact::Rankings, "\n\n", "out: holds no record"),
            (
                Artifact::Items,
                "{\"id\": \"1\", \"ti",
                "out:1: not valid JSON: EOF while parsing a string at line 1 column 15",
            ),
            (Artifact::Sequences, "1\n2\n", "out: holds no sequence"),
            (Artifact::SimilarItems, "anchor top1\n", "out: holds no line after its header"),
            (Artifact::Checkpoint, "x", "out: a file, where a folder (checkpoint) was declared"),
        ] {
            assert_eq!(on(kind, content, false, WHOLE), Err(message.to_owned()), "{kind} {content:?}");
        }
    }

    #[test]
    fn truncation_of_large_files_is_found_at_their_end() {
        let array = format!("[{}", "1, ".repeat(50));
        assert_eq!(on(Artifact::Sft, &array, false, 0), Err("out: the JSON document has no end".into()));
        let lines = format!("{}{{\"a\": 1", "{\"a\": 1}\n".repeat(20));
        assert_eq!(on(Artifact::Tids, &lines, false, 0), Err("out: the last line is not valid JSON".into()));
    }

    #[test]
    fn folders_are_told_from_files() {
        let folder = tempfile::tempdir().unwrap();
        let error = |kind, path: &Path| check(kind, path, false).unwrap_err().to_string();
        assert!(error(Artifact::Items, &folder.path().join("none")).ends_with("the output was not written"));
        assert!(error(Artifact::Items, folder.path()).ends_with("a folder, where a file (items) was declared"));
        assert!(error(Artifact::Checkpoint, folder.path()).ends_with("the folder is empty"));
        fs::write(folder.path().join("x"), "").unwrap();
        assert!(check(Artifact::Checkpoint, folder.path(), false).is_ok());
        assert!(check(Artifact::Any, folder.path(), false).is_ok());
    }
}
