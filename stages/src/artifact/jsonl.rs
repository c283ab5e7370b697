//! JSON Lines in and out, with errors that name file and line.

use std::{
    fs::File,
    io::{BufRead, BufReader, BufWriter, ErrorKind, Write},
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

use super::text;
use crate::StageError;

/// Reads a JSON Lines file; blank lines are passed over.
///
/// # Errors
/// The first line that is not a `T`, with its number; or the file cannot be read.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, StageError> {
    lines(path)?.collect()
}

/// Reads a JSON Lines file one record at a time.
///
/// # Errors
/// The file cannot be opened; each item says what is wrong with its own line.
pub fn lines<T: DeserializeOwned>(
    path: &Path,
) -> Result<impl Iterator<Item = Result<T, StageError>> + use<T>, StageError> {
    let file = File::open(path).map_err(|e| StageError::io("open", path, e))?;
    let owned: PathBuf = path.to_owned();
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let (mut number, mut line) = (0u64, String::new());
    Ok(std::iter::from_fn(move || {
        loop {
            line.clear();
            number += 1;
            match reader.read_line(&mut line) {
                Ok(0) => return None,
                Ok(_) if line.trim().is_empty() => {}
                Ok(_) => {
                    return Some(serde_json::from_str(&line).map_err(|e| {
                        StageError::input_at(&owned, number, format!("not a valid record: {}", reason(&e)))
                    }));
                }
                Err(e) if e.kind() == ErrorKind::InvalidData => return Some(Err(text::not_utf8(&owned, number))),
                Err(e) => return Some(Err(StageError::io("read", &owned, e))),
            }
        }
    }))
}

/// What is wrong with a line, and in which column: serde counts every line as its first.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    match text.strip_suffix(&place) {
        Some(what) if error.column() > 0 => format!("{what} (column {})", error.column()),
        Some(what) => what.to_owned(),
        None => text,
    }
}

/// Writes JSON Lines.
pub struct Writer {
    path: PathBuf,
    out: BufWriter<File>,
    line: Vec<u8>,
}

impl Writer {
    /// # Errors
    /// The file cannot be created.
    pub fn create(path: &Path) -> Result<Self, StageError> {
        let file = File::create(path).map_err(|e| StageError::io("create", path, e))?;
        Ok(Self { path: path.to_owned(), out: BufWriter::with_capacity(1 << 16, file), line: Vec::new() })
    }

    /// # Errors
    /// The disk is full, or the like.
    pub fn write<T: Serialize>(&mut self, record: &T) -> Result<(), StageError> {
        self.line.clear();
        serde_json::to_writer(&mut self.line, record)
            .map_err(std::io::Error::from)
            .and_then(|()| {
                self.line.push(b'\n');
                self.out.write_all(&self.line)
            })
            .map_err(|e| StageError::io("write", &self.path, e))
    }

    /// Flushes; without it the last records may be lost silently.
    ///
    /// # Errors
    /// The disk is full, or the like.
    pub fn finish(mut self) -> Result<(), StageError> {
        self.out.flush().map_err(|e| StageError::io("write", &self.path, e))
    }
}

/// Writes all `records`.
///
/// # Errors
/// As [`Writer`].
pub fn write<T: Serialize>(path: &Path, records: impl IntoIterator<Item = T>) -> Result<(), StageError> {
    let mut writer = Writer::create(path)?;
    for record in records {
        writer.write(&record)?;
    }
    writer.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_line_is_told_with_its_number_and_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("items.jsonl");
        let told = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            read::<serde_json::Map<String, serde_json::Value>>(&path).unwrap_err().to_string()
        };
        let told = |bytes: &[u8]| told(bytes).split("items.jsonl").last().unwrap().to_owned();
        assert_eq!(told(b"{}\n\n{\"a\": x}\n"), ":3: not a valid record: expected value (column 7)");
        assert_eq!(told(b"{\"a\": \n"), ":1: not a valid record: EOF while parsing a value");
        assert_eq!(told(b"{}\n{\"a\": \"caf\xe9\"}\n"), ":2: not UTF-8 text");
    }
}
