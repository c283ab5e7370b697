//! One item of a user's history as text: the form in which `sft_rec` teaches and `generate` asks.
//!
//! - text, fixed: `Item text ID: [w1, …, w5] Title: T.` and a line break; no `Title: …` for an item without one.
//! - text, reference: the same, but a missing title reads `None`, an empty one nothing (`Title: .`), and the square
//!   brackets that stray into words are removed only from a history's first item.
//! - compact: the words with a space between them, and a line break; an item is its TID and nothing else.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Compat, artifact::TidRecord};

/// What stands before an item's TID. Generation continues a text history with this.
pub const TID_LABEL: &str = "Item text ID:";

/// How a recommendation sample is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// An instruction, and items as `Item text ID: [w1, …, w5] Title: T.`, as published.
    #[default]
    Text,
    /// No instruction, and one line of five words an item.
    Compact,
}

/// Where in the history an item stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    First,
    Later,
}

/// Appends an item in text format, with its line break.
pub fn push_text(out: &mut String, record: &TidRecord, place: Place, compat: Compat) {
    out.push_str(TID_LABEL);
    out.push(' ');
    match (compat, place) {
        (Compat::Reference, Place::Later) => push_tid(out, record.words()),
        _ => push_tid(out, record.clean_words()),
    }
    match compat {
        Compat::Reference => {
            out.push_str(" Title: ");
            out.push_str(&record.python_text("title", "None"));
            out.push('.');
        }
        Compat::Fixed => {
            if let Some(title) = record.title() {
                out.push_str(" Title: ");
                out.push_str(&title);
                out.push('.');
            }
        }
    }
    out.push('\n');
}

/// Appends an item in compact format, with its line break.
pub fn push_compact(out: &mut String, record: &TidRecord) {
    for (i, word) in record.clean_words().enumerate() {
        if i > 0 {
            out.push(' ');
        }
        out.push_str(word);
    }
    out.push('\n');
}

/// Appends `[w1, w2, …]`.
pub fn push_tid<'a>(out: &mut String, words: impl IntoIterator<Item = &'a str>) {
    out.push('[');
    for (i, word) in words.into_iter().enumerate() {
        if i > 0 {
            out.push_str(", ");
        }
        out.push_str(word);
    }
    out.push(']');
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn text(record: Value, place: Place, compat: Compat) -> String {
        let mut out = String::new();
        push_text(&mut out, &TidRecord::from_value(record).unwrap(), place, compat);
        out
    }

    #[test]
    fn brackets_and_titles_follow_compat() {
        let record = json!({"id": "1", "title": "T", "summary_words": ["[a]", "b", "c", "d", "e"]});
        for (place, compat, expected) in [
            (Place::First, Compat::Reference, "Item text ID: [a, b, c, d, e] Title: T.\n"),
            (Place::Later, Compat::Reference, "Item text ID: [[a], b, c, d, e] Title: T.\n"),
            (Place::Later, Compat::Fixed, "Item text ID: [a, b, c, d, e] Title: T.\n"),
        ] {
            assert_eq!(text(record.clone(), place, compat), expected);
        }
        let untitled = json!({"id": "1", "summary_words": ["a"]});
        assert_eq!(text(untitled.clone(), Place::Later, Compat::Reference), "Item text ID: [a] Title: None.\n");
        assert_eq!(text(untitled, Place::Later, Compat::Fixed), "Item text ID: [a]\n");
        let empty = json!({"id": "1", "title": "", "summary_words": ["a"]});
        assert_eq!(text(empty.clone(), Place::Later, Compat::Reference), "Item text ID: [a] Title: .\n");
        assert_eq!(text(empty, Place::Later, Compat::Fixed), "Item text ID: [a]\n");
    }

    #[test]
    fn a_compact_item_is_a_line_of_words() {
        let mut out = String::new();
        let record = json!({"id": "1", "title": "T", "summary_words": ["a-b", "c]", "d", "e", "f"]});
        push_compact(&mut out, &TidRecord::from_value(record).unwrap());
        assert_eq!(out, "a-b c d e f\n");
    }
}
