//! Samples of an SFT file, and what can be told from their looks.

use std::path::Path;

use serde::Deserialize;

use crate::{
    StageError,
    artifact::{TID_LENGTH, text},
    sft::rec_text::TID_LABEL,
};

/// An alpaca sample. Further fields are passed over.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Sample {
    #[serde(default)]
    pub instruction: String,
    #[serde(default)]
    pub input: String,
    #[serde(default)]
    pub output: String,
}

/// What a sample teaches, by its looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A history of items as text: the first in the input, the others in the output.
    History,
    /// A history as lines of words, and nothing else.
    Compact,
    /// Anything else.
    Other,
}

impl Sample {
    /// Reads an SFT file: a JSON array of samples, or one sample a line.
    ///
    /// # Errors
    /// The file cannot be read, is not of that form, or holds no sample.
    pub fn read(path: &Path) -> Result<Vec<Self>, StageError> {
        let content = text::read(path)?;
        let samples: Vec<Self> = if content.trim_start().starts_with('[') {
            serde_json::from_str(&content).map_err(|e| text::json_error(path, &e, "an array of samples"))?
        } else {
            let lines = content.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty());
            lines
                .map(|(line, number)| {
                    serde_json::from_str(line)
                        .map_err(|e| StageError::input_at(path, number, format!("not a sample: {e}")))
                })
                .collect::<Result<_, _>>()?
        };
        if samples.is_empty() {
            return Err(StageError::input(path, "holds no sample")
                .help("the stage that wrote it says in its log what it left out, and why"));
        }
        Ok(samples)
    }

    pub fn shape(&self) -> Shape {
        let labelled = |text: &str| items(text).all(|item| item.starts_with(TID_LABEL));
        if self.instruction.is_empty() && self.input.is_empty() {
            let words = |line: &str| line.split(text::is_python_space).filter(|w| !w.is_empty()).count() == TID_LENGTH;
            let compact = !self.output.is_empty() && self.output.lines().all(words);
            return if compact { Shape::Compact } else { Shape::Other };
        }
        let history = self.input.starts_with(TID_LABEL) && items(&self.input).count() == 1 && labelled(&self.output);
        // The anchor of a collaborative sample is an item of a line too, but its answers are numbered.
        if history && (self.output.is_empty() || self.output.starts_with(TID_LABEL)) {
            Shape::History
        } else {
            Shape::Other
        }
    }

    /// What the model is asked, as LlamaFactory joins it.
    pub fn content(&self) -> String {
        content(&self.instruction, &self.input)
    }
}

/// Instruction and input, joined by a line break where both are there.
pub fn content(instruction: &str, input: &str) -> String {
    match (instruction, input) {
        ("", text) | (text, "") => text.to_owned(),
        (instruction, input) => format!("{instruction}\n{input}"),
    }
}

/// The items of a history as text, each with its line break. A title may have line breaks too: only those before the
/// label of the next item part.
pub fn items(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut ends = rest.match_indices('\n').map(|(at, _)| at + 1);
        let end = ends.find(|&at| rest[at..].starts_with(TID_LABEL)).unwrap_or(rest.len());
        let (item, tail) = rest.split_at(end);
        rest = tail;
        Some(item)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(instruction: &str, input: &str, output: &str) -> Sample {
        Sample { instruction: instruction.into(), input: input.into(), output: output.into() }
    }

    #[test]
    fn shapes_are_told_apart() {
        let first = "Item text ID: [a, b] Title: T\nT.\n";
        let history = sample("Go on", first, "Item text ID: [c]\nItem text ID: [d]\n");
        assert_eq!(history.shape(), Shape::History);
        assert_eq!(items(&history.output).collect::<Vec<_>>(), ["Item text ID: [c]\n", "Item text ID: [d]\n"]);
        assert_eq!(sample("", "", "a b c d e\nf g h i j\n").shape(), Shape::Compact);
        assert_eq!(sample("", "", "a b c\n").shape(), Shape::Other);
        assert_eq!(sample("Name", "Title: T", "[a, b]").shape(), Shape::Other);
        assert_eq!(sample("List", "Item text ID: [a] \nList 2:", "1. Item text ID: [b]\n").shape(), Shape::Other);
        assert_eq!(history.content(), format!("Go on\n{first}"));
        assert_eq!(sample("", "x", "").content(), "x");
    }

    #[test]
    fn files_of_both_forms_are_read_and_empty_ones_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sft.json");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Sample::read(&path).map_err(|e| e.to_string())
        };
        let one = sample("", "", "a");
        assert_eq!(read(r#"[{"output": "a", "more": 1}]"#), Ok(vec![one.clone()]));
        assert_eq!(read("{\"output\": \"a\"}\n\n{\"output\": \"a\"}\n"), Ok(vec![one.clone(), one]));
        assert!(read("[]").unwrap_err().contains("holds no sample"));
        assert!(read("").unwrap_err().contains("holds no sample"));
        assert!(read("[{\"output\": \n1}]").unwrap_err().contains(":2: not an array of samples"));
        assert!(read("{\"output\": \"a\"}\n{").unwrap_err().contains(":2: not a sample"));
    }
}
