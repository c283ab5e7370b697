//! Writing training files: a JSON array of samples in Python's layout, streamed.
//!
//! Samples are put together from parts that were escaped once; the file is never held as a whole.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
};

use crate::{StageError, artifact::python_json, prompts};

/// Bytes gathered before they are written: they stay in the cache of one core.
const CHUNK: usize = 1 << 17;

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
        push_element(&mut self.buffer, if self.elements == 0 { b'[' } else { b',' }, write);
        self.elements += 1;
        if self.buffer.len() >= CHUNK { self.flush() } else { Ok(()) }
    }

    /// Adds elements that were put together elsewhere.
    ///
    /// # Errors
    /// The disk is full, or the like.
    pub fn append(&mut self, mut elements: Elements) -> Result<(), StageError> {
        if let Some(separator) = elements.bytes.first_mut().filter(|_| self.elements == 0) {
            *separator = b'[';
        }
        self.elements += elements.count;
        self.flush()?;
        self.file.write_all(&elements.bytes).map_err(|e| StageError::io("write", &self.path, e))
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

/// Elements of an array, each with the comma before it.
#[derive(Default)]
pub struct Elements {
    bytes: Vec<u8>,
    count: u64,
}

impl Elements {
    /// Adds the element that `write` appends to the buffer, at nesting level 1.
    pub fn push(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        push_element(&mut self.bytes, b',', write);
        self.count += 1;
    }
}

fn push_element(out: &mut Vec<u8>, separator: u8, write: impl FnOnce(&mut Vec<u8>)) {
    out.push(separator);
    python_json::write_break(out, 1);
    write(out);
}

/// Text escaped for the inside of a JSON string.
pub fn escaped(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() + 16);
    python_json::write_escaped(&mut out, text);
    out
}

/// A template whose texts are escaped once, to be filled with values that are escaped already: together what
/// [`prompts::render`] and [`escaped`] give.
pub struct EscapedTemplate {
    /// What stands before each placeholder, and which of the names that is.
    parts: Vec<(Vec<u8>, usize)>,
    end: Vec<u8>,
}

impl EscapedTemplate {
    /// Other placeholders than `names` are text.
    pub fn new(template: &str, names: &[&str]) -> Self {
        let mut parts = Vec::new();
        let (mut rest, mut text) = (template, String::new());
        while let Some((before, name, after)) = prompts::next_placeholder(rest) {
            text.push_str(before);
            match names.iter().position(|known| *known == name) {
                Some(place) => parts.push((escaped(&std::mem::take(&mut text)), place)),
                None => text.push_str(&rest[before.len()..rest.len() - after.len()]),
            }
            rest = after;
        }
        text.push_str(rest);
        Self { parts, end: escaped(&text) }
    }

    /// The template in parts, with `values` in the order of the names.
    pub fn fill<'a, const N: usize>(&'a self, values: [&'a [u8]; N]) -> impl Iterator<Item = &'a [u8]> {
        self.parts.iter().flat_map(move |(text, place)| [&**text, values[*place]]).chain([&*self.end])
    }
}

/// Appends the three fields of an alpaca sample, at nesting level 2 and without the braces around them. Texts come in
/// parts that are escaped already.
pub fn push_fields<'i, 'o>(
    out: &mut Vec<u8>,
    instruction: &[u8],
    input: impl IntoIterator<Item = &'i [u8]>,
    output: impl IntoIterator<Item = &'o [u8]>,
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
pub fn push_sample<'i, 'o>(
    out: &mut Vec<u8>,
    instruction: &[u8],
    input: impl IntoIterator<Item = &'i [u8]>,
    output: impl IntoIterator<Item = &'o [u8]>,
) {
    out.push(b'{');
    push_fields(out, instruction, input, output);
    python_json::write_break(out, 1);
    out.push(b'}');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_put_together_elsewhere_are_written_as_those_pushed() {
        let folder = tempfile::tempdir().unwrap();
        let written = |name: &str, write: &dyn Fn(&mut ArrayWriter)| {
            let path = folder.path().join(name);
            let mut writer = ArrayWriter::create(&path).unwrap();
            write(&mut writer);
            let count = writer.finish().unwrap();
            (count, std::fs::read_to_string(path).unwrap())
        };
        let elements = |numbers: &[u8]| {
            let mut elements = Elements::default();
            numbers.iter().for_each(|number| elements.push(|out| out.push(*number)));
            elements
        };
        let pushed =
            written("pushed", &|writer| b"12345".iter().for_each(|n| writer.push(|out| out.push(*n)).unwrap()));
        assert_eq!(pushed, (5, "[\n  1,\n  2,\n  3,\n  4,\n  5\n]".to_owned()));
        for parts in [[&b""[..], b"12", b"345"], [b"12", b"", b"345"], [b"12345", b"", b""]] {
            let all = |writer: &mut ArrayWriter| parts.iter().for_each(|part| writer.append(elements(part)).unwrap());
            assert_eq!(written("appended", &all), pushed);
        }
        let mixed = |writer: &mut ArrayWriter| {
            writer.append(elements(b"1")).unwrap();
            writer.push(|out| out.push(b'2')).unwrap();
            writer.append(elements(b"34")).unwrap();
            writer.push(|out| out.push(b'5')).unwrap();
        };
        assert_eq!(written("mixed", &mixed), pushed);
        assert_eq!(written("none", &|writer| writer.append(elements(b"")).unwrap()), (0, "[]".to_owned()));
    }

    #[test]
    fn a_template_escaped_once_gives_what_rendering_and_escaping_give() {
        for template in ["{a}\n\"{b}\" {a} {c} {", "no \\ placeholder", "{a}{b}", ""] {
            let values = [("a", "1\n{b}"), ("b", "\"q\"")];
            let filled: Vec<u8> = EscapedTemplate::new(template, &["a", "b"])
                .fill(values.map(|(_, value)| escaped(value)).each_ref().map(Vec::as_slice))
                .flatten()
                .copied()
                .collect();
            assert_eq!(filled, escaped(&prompts::render(template, &values)), "{template}");
        }
    }
}
