//! What all readers of text artifacts share: opening a file with errors that a user understands, and showing a text.

use std::{fs, io, path::Path};

use crate::StageError;

/// Reads a whole UTF-8 file.
///
/// # Errors
/// The file is missing, cannot be read, or is not UTF-8 (with the line where it stops being it).
pub fn read(path: &Path) -> Result<String, StageError> {
    let bytes = fs::read(path).map_err(|e| open_error(path, e))?;
    String::from_utf8(bytes).map_err(|e| {
        let before = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        not_utf8(path, line_of(before))
    })
}

/// The error for a line that is not UTF-8.
pub fn not_utf8(path: &Path, line: u64) -> StageError {
    StageError::input_at(path, line, "not UTF-8 text").help("convert the file, for example with `iconv`")
}

/// The error for a file that cannot be opened: a missing input is the user's to mend, anything else the system's.
pub fn open_error(path: &Path, error: io::Error) -> StageError {
    match error.kind() {
        io::ErrorKind::NotFound => StageError::input(path, "no such file"),
        io::ErrorKind::IsADirectory => StageError::input(path, "a folder, where a file is expected"),
        _ => StageError::io("read", path, error),
    }
}

/// The 1-based number of the line on which text that starts with `before` goes on.
pub fn line_of(before: &[u8]) -> u64 {
    before.iter().filter(|&&b| b == b'\n').count() as u64 + 1
}

/// Turns a parse error inside a whole document into an error with its line.
pub fn json_error(path: &Path, error: &serde_json::Error, what: &str) -> StageError {
    let help = if error.is_eof() {
        "the file ends too early: it was cut off while it was written or copied"
    } else {
        "mend the file at this place"
    };
    StageError::Input {
        path: path.to_owned(),
        line: (error.line() > 0).then_some(error.line() as u64),
        message: format!("not {what}: {error}"),
        help: Some(help.into()),
    }
}

/// The beginning of a text, of at most so many characters and a mark where it goes on: how messages show it.
pub fn beginning(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Whether Python's `str.split()` separates words at `c`: Unicode white space and the four information separators.
pub fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_files_are_named_with_their_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.txt");
        assert!(read(&path).unwrap_err().to_string().ends_with("x.txt: no such file"));
        fs::write(&path, b"good\nb\xffad\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().ends_with("x.txt:2: not UTF-8 text"));
        assert!(read(folder.path()).unwrap_err().to_string().ends_with("a folder, where a file is expected"));
    }

    #[test]
    fn a_long_text_is_shown_by_its_beginning() {
        assert_eq!(["", "été", "étés"].map(|text| beginning(text, 3)), ["", "été", "été…"]);
    }

    #[test]
    fn truncated_json_says_so() {
        let error = serde_json::from_str::<serde_json::Value>("{\n \"a\": [1,").unwrap_err();
        let error = json_error(Path::new("x.json"), &error, "a JSON object");
        assert!(error.to_string().starts_with("x.json:2: not a JSON object: EOF while parsing"), "{error}");
        assert!(error.help_text().unwrap().contains("cut off"));
    }
}
