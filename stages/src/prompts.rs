//! The prompt texts: loading, checking, and filling in their placeholders.
//!
//! The built-in texts are our own (`prompts/default.json`); a file of the same layout, connected to a stage's `prompts`
//! port, replaces those that it has. What a placeholder stands for is decided by the stage that renders the prompt.

use std::{collections::BTreeSet, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{StageError, artifact::text};

/// All prompt texts, as the `prompts` artifact holds them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompts {
    /// Asks for an item's TID: `{title_line}`, `{description_line}`, `{neighbor_lines}`.
    pub tid_extraction: String,
    /// Teaches to name an item: `{title_line}`, `{description_line}` in the input.
    pub sft_meta2tid: Prompt,
    /// Teaches to continue a history.
    pub sft_rec: Instruction,
    /// Teaches which items go together: `{item_line}`, `{count}` in the input.
    pub sft_collaborative: Prompt,
}

/// The instruction, and the template of the input, of an alpaca sample.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object with the texts `instruction` and `input`")]
pub struct Prompt {
    pub instruction: String,
    pub input: String,
}

/// An instruction whose input is not a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object with the text `instruction`")]
pub struct Instruction {
    pub instruction: String,
}

/// A file of prompts: what it leaves out is built in.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Given {
    tid_extraction: Option<String>,
    sft_meta2tid: Option<Prompt>,
    sft_rec: Option<Instruction>,
    sft_collaborative: Option<Prompt>,
}

impl Given {
    fn read(path: &Path, help: &str) -> Result<Self, StageError> {
        let text = text::read(path)?;
        let value = serde_json::from_str(&text).ok();
        let kind = match &value {
            None | Some(Value::Object(_)) => None,
            Some(Value::Array(_)) => Some("a list"),
            Some(Value::String(_)) => Some("a single text"),
            Some(_) => Some("a single value"),
        };
        if let Some(kind) = kind {
            let message = format!("{kind} instead of an object of texts, such as {{\"tid_extraction\": \"…\"}}");
            return Err(StageError::input(path, message).help(format!("give all or some of {TEXTS}: {help}")));
        }
        let given = serde_json::from_str(&text).map_err(|e| match text::json_error(path, &e, "a file of prompts") {
            error if e.is_data() => error.help(help),
            error => error,
        })?;
        // serde takes a list for the fields in their order.
        let list = value.as_ref().and_then(Value::as_object).into_iter().flatten().find(|(_, entry)| entry.is_array());
        match list {
            None => Ok(given),
            Some((name, _)) => {
                let message = format!("`{name}` is a list instead of an object, such as {{\"instruction\": \"…\"}}");
                Err(StageError::input(path, message).help(help))
            }
        }
    }
}

/// What a file of prompts may hold.
const TEXTS: &str = "`tid_extraction`, `sft_meta2tid`, `sft_rec` and `sft_collaborative`";

/// The placeholders that each template must have, by its place in the file.
pub const TEMPLATES: [(&str, &[&str]); 3] = [
    ("tid_extraction", &["title_line", "description_line", "neighbor_lines"]),
    ("sft_meta2tid.input", &["title_line", "description_line"]),
    ("sft_collaborative.input", &["item_line", "count"]),
];

impl Prompts {
    /// Reads the texts at `path`; the built-in ones for what it leaves out, or if there is no path.
    ///
    /// # Errors
    /// The file cannot be read, has another layout, or a template lacks a placeholder or has an unknown one.
    pub fn load(path: Option<&Path>) -> Result<Self, StageError> {
        let own = Self::built_in()?;
        let Some(path) = path else { return Ok(own) };
        let help = "docs/data.md lists the texts and what each must hold";
        let given = Given::read(path, help)?;
        let prompts = Self {
            tid_extraction: given.tid_extraction.unwrap_or(own.tid_extraction),
            sft_meta2tid: given.sft_meta2tid.unwrap_or(own.sft_meta2tid),
            sft_rec: given.sft_rec.unwrap_or(own.sft_rec),
            sft_collaborative: given.sft_collaborative.unwrap_or(own.sft_collaborative),
        };
        prompts.check().map_err(|message| StageError::input(path, message).help(help))?;
        Ok(prompts)
    }

    /// The texts that come with grlm.
    ///
    /// # Errors
    /// A bug: a test reads them.
    pub fn built_in() -> Result<Self, StageError> {
        serde_json::from_str(include_str!("../prompts/default.json"))
            .map_err(|e| StageError::bug(format!("the built-in prompts: {e}")))
    }

    /// # Errors
    /// The first template with a missing or unknown placeholder, in words.
    pub fn check(&self) -> Result<(), String> {
        let texts = [&self.tid_extraction, &self.sft_meta2tid.input, &self.sft_collaborative.input];
        for ((place, wanted), text) in TEMPLATES.iter().zip(texts) {
            let found: BTreeSet<&str> = placeholders(text).collect();
            if let Some(missing) = wanted.iter().find(|&name| !found.contains(name)) {
                return Err(format!("`{place}` lacks the placeholder `{{{missing}}}`"));
            }
            if let Some(unknown) = found.iter().find(|name| !wanted.contains(name)) {
                return Err(format!("`{place}` has an unknown placeholder `{{{unknown}}}`"));
            }
        }
        Ok(())
    }
}

/// Puts `values` in place of the placeholders of their names, all in one pass: braces inside a value stay what they
/// are. A placeholder without a value stays too.
pub fn render(template: &str, values: &[(&str, &str)]) -> String {
    let mut out = String::with_capacity(template.len() + values.iter().map(|(_, v)| v.len()).sum::<usize>());
    let mut rest = template;
    while let Some((before, name, after)) = next_placeholder(rest) {
        out.push_str(before);
        match values.iter().find(|(key, _)| *key == name) {
            Some((_, value)) => out.push_str(value),
            None => out.push_str(&rest[before.len()..rest.len() - after.len()]),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// As [`render`], but a line that is nothing but a placeholder is left out where its value is empty.
pub fn render_without_empty_lines(template: &str, values: &[(&str, &str)]) -> String {
    let is_empty = |line: &str| match next_placeholder(line) {
        Some(("", name, "")) => values.iter().any(|(key, value)| *key == name && value.is_empty()),
        _ => false,
    };
    let lines: Vec<&str> = template.split('\n').filter(|line| !is_empty(line)).collect();
    render(&lines.join("\n"), values)
}

/// The names in `{name}`; braces around anything but a lower-case name are text.
pub fn placeholders(template: &str) -> impl Iterator<Item = &str> {
    let mut rest = template;
    std::iter::from_fn(move || {
        let (_, name, after) = next_placeholder(rest)?;
        rest = after;
        Some(name)
    })
}

/// Text before the next placeholder, its name, text after it.
pub fn next_placeholder(text: &str) -> Option<(&str, &str, &str)> {
    for (open, _) in text.match_indices('{') {
        let inner = &text[open + 1..];
        let end =
            inner.find(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit() && c != '_').unwrap_or(inner.len());
        if end > 0 && inner[end..].starts_with('}') {
            return Some((&text[..open], &inner[..end], &inner[end + 1..]));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_texts_are_complete() {
        let prompts = Prompts::load(None).unwrap();
        prompts.check().unwrap();
        assert!(!prompts.sft_rec.instruction.trim().is_empty());
    }

    #[test]
    fn what_a_file_leaves_out_is_built_in() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.json");
        let text = "Five words for {title_line} {description_line} {neighbor_lines}";
        std::fs::write(&path, serde_json::json!({"tid_extraction": text}).to_string()).unwrap();
        let own = Prompts::built_in().unwrap();
        assert_eq!(Prompts::load(Some(&path)).unwrap(), Prompts { tid_extraction: text.into(), ..own });
    }

    #[test]
    fn values_are_filled_in_once() {
        let filled = render("{a}{b} {c} {A} {} { a} {\"a\": 1} {a", &[("a", "{b}"), ("b", "2")]);
        assert_eq!(filled, "{b}2 {c} {A} {} { a} {\"a\": 1} {a");
    }

    #[test]
    fn lines_of_empty_values_can_be_left_out() {
        let values = [("a", ""), ("b", "B")];
        assert_eq!(render_without_empty_lines("x\n{a}\n{b}\n{a}", &values), "x\nB");
        assert_eq!(render_without_empty_lines("x {a}\n\n{b}", &values), "x \n\nB");
    }

    #[test]
    fn a_file_with_a_wrong_placeholder_or_field_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.json");
        let mut prompts = Prompts::built_in().unwrap();
        prompts.sft_collaborative.input = "{item_line} {cuont}".into();
        std::fs::write(&path, serde_json::to_string(&prompts).unwrap()).unwrap();
        let error = Prompts::load(Some(&path)).unwrap_err().to_string();
        assert!(error.ends_with("`sft_collaborative.input` lacks the placeholder `{count}`"), "{error}");

        std::fs::write(&path, "{\"tid_extraction\": \"\",\n \"sft\": 1}").unwrap();
        let error = Prompts::load(Some(&path)).unwrap_err().to_string();
        assert!(error.contains("p.json:2: not a file of prompts: unknown field `sft`"), "{error}");
    }

    #[test]
    fn a_file_of_another_shape_is_told_what_it_should_be() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.json");
        let refused = |text: &str| {
            std::fs::write(&path, text).unwrap();
            let error = Prompts::load(Some(&path)).unwrap_err();
            (error.to_string(), error.help_text().unwrap().to_owned())
        };
        let shapes =
            [("[]", "a list"), (r#"["a", null]"#, "a list"), (r#""a""#, "a single text"), ("null", "a single value")];
        for (text, kind) in shapes {
            let (error, help) = refused(text);
            assert!(error.contains(&format!("p.json: {kind} instead of an object of texts")), "{error}");
            assert!(help.contains("`sft_collaborative`: docs/data.md"), "{help}");
        }
        let (error, help) = refused("{\"sft_rec\":\n \"Go on.\"}");
        let expected =
            "p.json:2: not a file of prompts: invalid type: string \"Go on.\", expected an object with the text";
        assert!(error.contains(expected) && help.starts_with("docs/data.md"), "{error} {help}");
        for text in [r#"{"sft_rec": ["Go on."]}"#, r#"{"sft_rec": null, "sft_meta2tid": ["a", "b"]}"#] {
            let (error, help) = refused(text);
            assert!(error.contains("` is a list instead of an object") && help.starts_with("docs/data.md"), "{error}");
        }
        assert!(refused(r#"{"tid_extraction": ["a"]}"#).0.contains("invalid type: sequence, expected a string"));
        assert!(refused(r#"{"tid_extraction": 1}"#).0.contains("invalid type: integer `1`, expected a string"));
        assert!(refused("{").1.contains("cut off"));
    }
}
