//! `items`: a catalogue, one [`Item`] a line, or the reference's object id → fields.
//!
//! Fields that no stage knows are kept, in their order, so that what a user put into the catalogue comes out in the
//! TID records. Mending a raw catalogue is the work of `import_items`; this reader takes only a clean one.

use std::{borrow::Cow, path::Path};

use rustc_hash::FxHashMap;
use serde_json::{Map, Value};

use super::{ItemId, python_json, text};
use crate::StageError;

/// A catalogue entry: its id, and its other fields in the catalogue's order.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    pub id: ItemId,
    pub fields: Map<String, Value>,
}

impl Item {
    /// The title without surrounding white space; `None` if missing or blank.
    pub fn title(&self) -> Option<Cow<'_, str>> {
        self.text("title")
    }

    pub fn description(&self) -> Option<Cow<'_, str>> {
        self.text("description")
    }

    pub fn categories(&self) -> Option<Cow<'_, str>> {
        self.text("categories")
    }

    pub fn brand(&self) -> Option<Cow<'_, str>> {
        self.text("brand")
    }

    pub fn domain(&self) -> Option<Cow<'_, str>> {
        self.text("domain")
    }

    /// A field as text: a string trimmed, a list (of lists) joined by spaces; `None` if missing or blank.
    pub fn text(&self, field: &str) -> Option<Cow<'_, str>> {
        self.fields.get(field).and_then(value_text)
    }

    /// A field as an f-string of the published scripts shows it: lists as Python literals, white space kept. `None`
    /// where Python would take the field for false.
    pub fn python_text(&self, field: &str) -> Option<String> {
        self.fields.get(field).filter(|v| python_json::is_truthy(v)).map(python_json::python_str)
    }

    /// `{"id": …, fields…}`.
    pub fn to_value(&self) -> Value {
        let mut record = Map::with_capacity(self.fields.len() + 1);
        record.insert("id".into(), Value::String(self.id.0.clone()));
        record.extend(self.fields.iter().map(|(k, v)| (k.clone(), v.clone())));
        Value::Object(record)
    }

    /// Takes a record apart.
    ///
    /// # Errors
    /// What is wrong, in words: not an object, no `id`, or an `id` that is no string or whole number.
    pub fn from_value(value: Value) -> Result<Self, String> {
        let Value::Object(mut fields) = value else { return Err("not a JSON object".into()) };
        let id = fields.shift_remove("id").ok_or("the field `id` is missing")?;
        Ok(Self { id: id_from(&id)?, fields })
    }
}

/// An id as the catalogue spells it; whole numbers are taken as their digits.
///
/// # Errors
/// What is wrong with it, in words.
pub fn id_from(value: &Value) -> Result<ItemId, String> {
    match value {
        Value::String(id) => checked_id(id),
        Value::Number(id) if !id.is_f64() => checked_id(&id.to_string()),
        other => Err(format!("the id {other} is neither a string nor a whole number")),
    }
}

/// As [`id_from`], for an id that is a string.
///
/// # Errors
/// It is empty or holds white space.
pub fn checked_id(id: &str) -> Result<ItemId, String> {
    if id.is_empty() || id.contains(text::is_python_space) {
        return Err(format!("the id {id:?} is empty or holds white space, and could not stand in a sequence"));
    }
    Ok(ItemId(id.to_owned()))
}

/// A field's value as text, see [`Item::text`].
pub fn value_text(value: &Value) -> Option<Cow<'_, str>> {
    let text = match value {
        Value::String(text) => Cow::Borrowed(text.trim()),
        Value::Null => return None,
        other => {
            let mut parts = Vec::new();
            flatten(other, &mut parts);
            Cow::Owned(parts.join(" "))
        }
    };
    (!text.is_empty()).then_some(text)
}

fn flatten(value: &Value, parts: &mut Vec<String>) {
    match value {
        Value::Null => {}
        Value::String(text) if text.trim().is_empty() => {}
        Value::String(text) => parts.push(text.trim().to_owned()),
        Value::Array(items) => items.iter().for_each(|v| flatten(v, parts)),
        Value::Object(fields) => fields.values().for_each(|v| flatten(v, parts)),
        scalar => parts.push(scalar.to_string()),
    }
}

/// Which of the forms a catalogue file is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// One object a line.
    Lines,
    /// One object, id → fields.
    Object,
    /// One array of objects.
    Array,
}

/// Tells the form of a JSON catalogue from how it begins.
pub fn form(text: &str) -> Form {
    let start = text.trim_start();
    if start.starts_with('[') {
        return Form::Array;
    }
    let first = start.lines().next().unwrap_or_default();
    match serde_json::from_str::<Map<String, Value>>(first) {
        // An object of objects written on one line, and nothing behind it.
        Ok(fields) if !fields.contains_key("id") && fields.values().all(Value::is_object) => Form::Object,
        Ok(_) => Form::Lines,
        // `{"id": …` cut off, or garbage: judged as lines, where the error will name the line.
        Err(_) if first.len() > 1 && first.starts_with("{\"id\"") => Form::Lines,
        Err(_) => Form::Object,
    }
}

/// Reads a catalogue.
///
/// # Errors
/// The file cannot be read or is not a catalogue, is empty, or has one id twice.
pub fn read(path: &Path) -> Result<Vec<Item>, StageError> {
    let text = text::read(path)?;
    let mut items = Vec::new();
    for_each(path, &text, |line, record| {
        items.push((line, record?));
        Ok(())
    })?;
    if items.is_empty() {
        return Err(StageError::input(path, "holds no item"));
    }
    let mut seen = FxHashMap::default();
    for (line, item) in &items {
        if let Some(first) = seen.insert(&item.id, *line) {
            return Err(StageError::Input {
                path: path.to_owned(),
                line: *line,
                message: match first {
                    Some(first) => format!("item `{}` stands on line {first} already", item.id),
                    None => format!("item `{}` stands here twice", item.id),
                },
                help: Some("run the catalogue through an `import_items` stage, which keeps one of them".into()),
            });
        }
    }
    Ok(items.into_iter().map(|(_, item)| item).collect())
}

/// Calls `visit` with every record of a catalogue in any JSON form, and its line where the form has one. What is
/// wrong with a single record goes to `visit`, which decides whether to go on.
///
/// # Errors
/// The document as a whole is broken, or `visit` gave up.
pub fn for_each(
    path: &Path,
    text: &str,
    mut visit: impl FnMut(Option<u64>, Result<Item, StageError>) -> Result<(), StageError>,
) -> Result<(), StageError> {
    let wrong =
        |line: Option<u64>, message: String| StageError::Input { path: path.to_owned(), line, message, help: None };
    if text.trim().is_empty() {
        return Err(StageError::input(path, "the file is empty"));
    }
    match form(text) {
        Form::Lines => {
            for (line, number) in text.split('\n').zip(1u64..).filter(|(l, _)| !l.trim().is_empty()) {
                let record = serde_json::from_str::<Value>(line)
                    .map_err(|e| wrong(Some(number), format!("not valid JSON: {e}")))
                    .and_then(|value| Item::from_value(value).map_err(|m| wrong(Some(number), m)));
                visit(Some(number), record)?;
            }
        }
        Form::Object => {
            let records: Map<String, Value> = serde_json::from_str(text)
                .map_err(|e| text::json_error(path, &e, "a catalogue (object id → fields)"))?;
            for (id, fields) in records {
                let record = match fields {
                    Value::Object(mut fields) => id_from(&Value::String(id)).map(|id| {
                        // The key is the id; a field of that name would stand beside it.
                        fields.shift_remove("id");
                        Item { id, fields }
                    }),
                    other => Err(format!("item `{id}` is {other}, not an object of fields")),
                };
                visit(None, record.map_err(|m| wrong(None, m)))?;
            }
        }
        Form::Array => {
            let records: Vec<Value> =
                serde_json::from_str(text).map_err(|e| text::json_error(path, &e, "a catalogue (array of objects)"))?;
            for (i, value) in records.into_iter().enumerate() {
                visit(None, Item::from_value(value).map_err(|m| wrong(None, format!("record {}: {m}", i + 1))))?;
            }
        }
    }
    Ok(())
}

/// Writes a catalogue as JSON Lines.
///
/// # Errors
/// The file cannot be written.
pub fn write<'a>(path: &Path, items: impl IntoIterator<Item = &'a Item>) -> Result<(), StageError> {
    let mut out = Vec::new();
    for item in items {
        python_json::write_line(&mut out, &item.to_value());
        out.push(b'\n');
    }
    std::fs::write(path, out).map_err(|e| StageError::io("write", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Vec<Item>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("items");
        std::fs::write(&path, text).unwrap();
        read(&path).map_err(|e| e.to_string().rsplit_once('/').unwrap().1.to_owned())
    }

    #[test]
    fn all_forms_give_the_same_items() {
        let lines = read_text("{\"id\": \"b\", \"title\": \"T\", \"x\": [1]}\n\n{\"id\": 7}\n").unwrap();
        assert_eq!(lines[0].fields.keys().collect::<Vec<_>>(), ["title", "x"]);
        assert_eq!(lines, read_text("{\"b\": {\"title\": \"T\", \"x\": [1]}, \"7\": {}}").unwrap());
        assert_eq!(lines, read_text("{\n\"b\": {\"title\": \"T\", \"x\": [1]},\n \"7\": {}}").unwrap());
        assert_eq!(lines, read_text("[{\"id\": \"b\", \"title\": \"T\", \"x\": [1]}, {\"id\": \"7\"}]").unwrap());
    }

    #[test]
    fn fields_may_be_strings_lists_missing_or_blank() {
        let items = read_text(
            r#"{"id": "1", "title": " T ", "description": ["a", " ", "b"], "categories": [["x", "y"], ["z"]], "brand": ""}"#,
        )
        .unwrap();
        let item = &items[0];
        assert_eq!(item.title().as_deref(), Some("T"));
        assert_eq!(item.description().as_deref(), Some("a b"));
        assert_eq!(item.categories().as_deref(), Some("x y z"));
        assert_eq!((item.brand(), item.domain()), (None, None));
        assert_eq!(item.python_text("description").as_deref(), Some("['a', ' ', 'b']"));
    }

    #[test]
    fn broken_catalogues_are_refused_with_their_place() {
        for (text, message) in [
            ("", "items: the file is empty"),
            ("{}", "items: holds no item"),
            ("{\"id\": \"1\"}\n{\"id\": \"1\"}\n", "items:2: item `1` stands on line 1 already"),
            ("{\"id\": \"1\"}\n{\"id\": \"2\", \"ti", "items:2: not valid JSON: EOF while parsing a string"),
            ("{\"id\": \"1\"}\n{\"title\": \"2\"}", "items:2: the field `id` is missing"),
            ("{\"id\": \"a b\"}", "items:1: the id \"a b\" is empty or holds white space"),
            ("{\"1\": {},\n\"2\": {\"a\": ", "items:2: not a catalogue (object id → fields): EOF"),
            ("{\"1\": 5,\n\"2\": {}}", "items: item `1` is 5, not an object"),
            ("[{\"id\": 1.5}]", "items: record 1: the id 1.5 is neither"),
        ] {
            let error = read_text(text).unwrap_err();
            assert!(error.starts_with(message), "{text:?}: {error}");
        }
    }
}
