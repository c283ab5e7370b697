//! Writing training files: a JSON array of samples in Python's layout, streamed.
//!
//! Samples are put together from parts that were escaped once; the file is never held as a whole.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
};

use crate::{StageError, artifact::python_json};

/// Bytes gathered before they are written.
const CHUNK: usize = 1 << 20;

/// Writes a JSON array, element by element.
pub struct ArrayWriter {
    path: PathBuf,
    file: File,
    buffer: Vec<u8>,
    elements: u64,
}

impl ArrayWriter {
    /// # Errors
    /// The file cannot be created.
    pub fn create(path: &Path) -> Result<Self, StageError> {
        let file = File::create(path).map_err(|e| StageError::io("create", path, e))?;
        Ok(Self { path: path.to_owned(), file, buffer: Vec::with_capacity(2 * CHUNK), elements: 0 })
    }

    /// Adds the element that `write` appends to the buffer, at nesting level 1.
    ///
    /// # Errors
    /// The disk is full, or the like.
    pub fn push(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> Result<(), StageError> {
        self.buffer.push(if self.elements == 0 { b'[' } else { b',' });
        python_json::write_break(&mut self.buffer, 1);
        write(&mut self.buffer);
        self.elements += 1;
        if self.buffer.len() >= CHUNK { self.flush() } else { Ok(()) }
    }

    /// Ends the array, and says how many elements it has. Without it the file is not whole.
    ///
    /// # Errors
    /// The disk is full, or the like.
    pub fn finish(mut self) -> Result<u64, StageError> {
        if self.elements == 0 {
            self.buffer.extend_from_slice(b"[]");
        } else {
            python_json::write_break(&mut self.buffer, 0);
            self.buffer.push(b']');
        }
        self.flush()?;
        Ok(self.elements)
    }

    fn flush(&mut self) -> Result<(), StageError> {
        self.file.write_all(&self.buffer).map_err(|e| StageError::io("write", &self.path, e))?;
        self.buffer.clear();
        Ok(())
    }
}

/// Text escaped for the inside of a JSON string.
pub fn escaped(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() + 16);
    python_json::write_escaped(&mut out, text);
    out
}

/// Appends the three fields of an alpaca sample, at nesting level 2 and without the braces around them. Texts come in
/// parts that are escaped already.
pub fn push_fields<'a>(
    out: &mut Vec<u8>,
    instruction: &[u8],
    input: impl IntoIterator<Item = &'a [u8]>,
    output: impl IntoIterator<Item = &'a [u8]>,
) {
    push_field(out, b"\"instruction\": \"", [instruction]);
    out.push(b',');
    push_field(out, b"\"input\": \"", input);
    out.push(b',');
    push_field(out, b"\"output\": \"", output);
}

fn push_field<'a>(out: &mut Vec<u8>, name: &[u8], parts: impl IntoIterator<Item = &'a [u8]>) {
    python_json::write_break(out, 2);
    out.extend_from_slice(name);
    for part in parts {
        out.extend_from_slice(part);
    }
    out.push(b'"');
}

/// Appends an alpaca sample at nesting level 1.
pub fn push_sample(out: &mut Vec<u8>, instruction: &[u8], input: &[u8], output: &[u8]) {
    out.push(b'{');
    push_fields(out, instruction, [input], [output]);
    python_json::write_break(out, 1);
    out.push(b'}');
}
