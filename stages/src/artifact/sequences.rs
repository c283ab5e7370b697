//! The two text artifacts: `sequences` (`user item item …`, oldest first) and `similar_items` (a header, then
//! `anchor top1 … topN`).
//!
//! Both are read as one text with borrowed words, so that a builder can run over millions of lines without a copy.
//! What the ids mean, and whether they are known, is the reader's business.

use std::path::Path;

use super::{ItemId, UserId, text};
use crate::StageError;

/// One user's items, oldest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    pub user: UserId,
    pub items: Vec<ItemId>,
}

/// A line of either file, borrowed from its text.
#[derive(Debug, Clone)]
pub struct Line<'a> {
    /// 1-based number in the file.
    pub number: u64,
    /// The first word: the user, or the anchor item.
    pub head: &'a str,
    rest: &'a str,
}

impl<'a> Line<'a> {
    /// The words after the first.
    pub fn items(&self) -> impl DoubleEndedIterator<Item = &'a str> + use<'a> {
        self.rest.split(text::is_python_space).filter(|w| !w.is_empty())
    }
}

/// The lines of `text` that are not blank.
pub fn lines(text: &str) -> impl Iterator<Item = Line<'_>> {
    text.split('\n').zip(1u64..).filter_map(|(line, number)| {
        let line = line.trim_matches(text::is_python_space);
        let (head, rest) = line.split_once(text::is_python_space).unwrap_or((line, ""));
        (!head.is_empty()).then_some(Line { number, head, rest })
    })
}

/// The lines of a `similar_items` text: without its header.
pub fn similar_lines(text: &str) -> impl Iterator<Item = Line<'_>> {
    let header_end = text.find('\n').map_or(text.len(), |i| i + 1);
    lines(text.get(header_end..).unwrap_or_default()).map(|mut line| {
        line.number += 1;
        line
    })
}

/// Reads a `sequences` file.
///
/// # Errors
/// The file cannot be read, is not UTF-8, or holds no sequence.
pub fn read(path: &Path) -> Result<Vec<Sequence>, StageError> {
    let text = text::read(path)?;
    let sequences: Vec<_> = lines(&text)
        .map(|line| Sequence {
            user: UserId(line.head.to_owned()),
            items: line.items().map(|i| ItemId(i.to_owned())).collect(),
        })
        .collect();
    if sequences.is_empty() {
        return Err(
            StageError::input(path, "holds no sequence").help("one user a line: `user item item …`, oldest first")
        );
    }
    Ok(sequences)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_split_at_any_run_of_white_space() {
        let text = "1 10 11\n\n 2  20\t21 \r\n3\n";
        let read: Vec<_> = lines(text).map(|l| (l.number, l.head, l.items().collect::<Vec<_>>())).collect();
        assert_eq!(read, [(1, "1", vec!["10", "11"]), (3, "2", vec!["20", "21"]), (4, "3", vec![])]);
    }

    #[test]
    fn the_header_of_similar_items_is_left_out_whatever_it_says() {
        let text = "anchor top1\n5 6\n\n7 8 9\n";
        let read: Vec<_> = similar_lines(text).map(|l| (l.number, l.head)).collect();
        assert_eq!(read, [(2, "5"), (4, "7")]);
        assert_eq!(similar_lines("only a header").count(), 0);
    }

    #[test]
    fn an_empty_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.txt");
        std::fs::write(&path, "\n\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("holds no sequence"));
    }
}
