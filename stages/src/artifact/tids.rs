//! `tids` and `id2meta`: an item's own fields with its TID, the five words that name it.
//!
//! A record is kept as the ordered [`Fields`] it is, so that it can be written back byte for byte; [`TidRecord`]'s
//! accessors are the only place that knows the names of its fields. A [`TidRecord`] exists only with a list of
//! strings as its words; whether they are a *valid* TID is [`TidRecord::has_valid_tid`].

use std::{borrow::Cow, fmt, path::Path};

use rustc_hash::FxHashMap;
use serde::{
    Deserializer,
    de::{DeserializeSeed, Error as _, MapAccess, Visitor},
};
use serde_json::Value;

use super::{
    Fields, ItemId,
    fields::{Field, FieldsReader},
    items, python_json, text,
};
use crate::StageError;

/// Words in a TID.
pub const TID_LENGTH: usize = 5;

const WORDS: &str = "summary_words";

/// An item's fields plus `llm_output`, `summary_words` and `similar_item_ids`, in their order.
#[derive(Debug, Clone, PartialEq)]
pub struct TidRecord {
    id: ItemId,
    fields: Fields,
    /// The place of the words among the fields.
    words: usize,
}

impl TidRecord {
    /// # Errors
    /// What is wrong, in words: not an object, no `id`, or `summary_words` that are not a list of strings.
    pub fn from_value(value: Value) -> Result<Self, String> {
        let Value::Object(fields) = value else { return Err("not a JSON object".into()) };
        Self::from_fields(fields.into())
    }

    fn from_fields(fields: Fields) -> Result<Self, String> {
        let id = match fields.get("id").ok_or("the field `id` is missing")? {
            Field::Text(id) => items::checked_id(id)?,
            other => items::id_from(&other.to_value())?,
        };
        Self::new(id, fields)
    }

    /// # Errors
    /// `summary_words` is missing or not a list of strings.
    pub fn new(id: ItemId, fields: Fields) -> Result<Self, String> {
        let words = fields.place(WORDS).ok_or_else(|| format!("item `{id}` has no `{WORDS}`"))?;
        match fields.at(words) {
            Some(Field::Texts(_)) => Ok(Self { id, fields, words }),
            Some(Field::Value(Value::Array(list))) if list.iter().all(Value::is_string) => {
                Ok(Self { id, fields, words })
            }
            _ => Err(format!("`{WORDS}` of item `{id}` is not a list of strings")),
        }
    }

    pub fn id(&self) -> &ItemId {
        &self.id
    }

    /// All fields as they stand in the file.
    pub fn fields(&self) -> &Fields {
        &self.fields
    }

    /// The words as they stand in the file.
    pub fn words(&self) -> impl Iterator<Item = &str> {
        let (texts, values) = match self.fields.at(self.words) {
            Some(Field::Texts(texts)) => (Some(texts), None),
            Some(Field::Value(value)) => (None, value.as_array()),
            _ => (None, None),
        };
        texts.into_iter().flatten().chain(values.into_iter().flatten().filter_map(Value::as_str))
    }

    /// The words without square brackets around them: those of the TID that models read and write.
    pub fn clean_words(&self) -> impl Iterator<Item = &str> {
        self.words().map(clean_word)
    }

    /// The words joined by `,`: the key of `tid2item_id`.
    pub fn tid_key(&self) -> String {
        self.clean_words().collect::<Vec<_>>().join(",")
    }

    /// Whether there are five words and none is blank: what a recommender can be asked to generate.
    pub fn has_valid_tid(&self) -> bool {
        let mut count = 0;
        self.clean_words().all(|word| {
            count += 1;
            !word.trim_start().is_empty()
        }) && count == TID_LENGTH
    }

    pub fn set_words(&mut self, words: impl IntoIterator<Item = String>) {
        self.fields.set(WORDS, words.into_iter().map(Value::String).collect());
    }

    pub fn title(&self) -> Option<Cow<'_, str>> {
        self.text("title")
    }

    pub fn description(&self) -> Option<Cow<'_, str>> {
        self.text("description")
    }

    pub fn domain(&self) -> Option<Cow<'_, str>> {
        self.text("domain")
    }

    /// A field as text, see [`items::Item::text`].
    pub fn text(&self, field: &str) -> Option<Cow<'_, str>> {
        self.fields.get(field).and_then(Field::text)
    }

    /// `record.get(field, absent)` in an f-string of the published scripts.
    pub fn python_text<'a>(&'a self, field: &str, absent: &'a str) -> Cow<'a, str> {
        self.fields.get(field).map_or(Cow::Borrowed(absent), |field| field.python_str())
    }

    /// A field in an f-string of the published scripts; `None` where Python would take it for false.
    pub fn python_truthy(&self, field: &str) -> Option<Cow<'_, str>> {
        self.fields.get(field).filter(Field::is_truthy).map(|field| field.python_str())
    }
}

/// A TID word without the square brackets that some answers leave around it.
pub fn clean_word(word: &str) -> &str {
    word.trim_matches(['[', ']'])
}

/// Reads a `tids` file. An id may stand there twice; what that means is the reader's business.
///
/// # Errors
/// The file cannot be read, is empty, or has a line that is no record.
pub fn read(path: &Path) -> Result<Vec<TidRecord>, StageError> {
    let mut reader = FieldsReader::new(text::read(path)?);
    let text = reader.text();
    let mut records = Vec::new();
    for (line, number) in text.split('\n').zip(1u64..).filter(|(l, _)| !l.trim().is_empty()) {
        let mut json = serde_json::Deserializer::from_str(line);
        let fields = (&mut reader)
            .deserialize(&mut json)
            .and_then(|fields| json.end().map(|()| fields))
            .map_err(|e| StageError::input_at(path, number, format!("not valid JSON: {e}")))?;
        records.push(TidRecord::from_fields(fields).map_err(|m| StageError::input_at(path, number, m))?);
    }
    if records.is_empty() {
        return Err(StageError::input(path, "holds no record"));
    }
    Ok(records)
}

/// Writes a `tids` file, each line as Python's `json.dumps` would.
///
/// # Errors
/// The file cannot be written.
pub fn write<'a>(path: &Path, records: impl IntoIterator<Item = &'a TidRecord>) -> Result<(), StageError> {
    let mut out = Vec::new();
    for record in records {
        record.fields.write_line(&mut out);
        out.push(b'\n');
    }
    std::fs::write(path, out).map_err(|e| StageError::io("write", path, e))
}

/// The `id2meta` artifact: records by id, in their order.
#[derive(Debug, Clone, Default)]
pub struct Id2Meta {
    records: Vec<TidRecord>,
    index: FxHashMap<ItemId, usize>,
}

impl Id2Meta {
    /// # Errors
    /// The file cannot be read, is empty, or holds something that is no TID record.
    pub fn read(path: &Path) -> Result<Self, StageError> {
        let mut id2meta = Self::default();
        let mut reader = FieldsReader::new(text::read(path)?);
        let text = reader.text();
        let mut json = serde_json::Deserializer::from_str(&text);
        Entries { reader: &mut reader, id2meta: &mut id2meta }
            .deserialize(&mut json)
            .and_then(|()| json.end())
            .map_err(|e| text::json_error(path, &e, "an object id → record"))?;
        if id2meta.is_empty() {
            return Err(StageError::input(path, "holds no item"));
        }
        Ok(id2meta)
    }

    /// Adds a record; one with the same id is replaced at its place and given back.
    pub fn insert(&mut self, record: TidRecord) -> Option<TidRecord> {
        if let Some(&place) = self.index.get(record.id()) {
            return Some(std::mem::replace(&mut self.records[place], record));
        }
        self.index.insert(record.id().clone(), self.records.len());
        self.records.push(record);
        None
    }

    pub fn get(&self, id: &str) -> Option<&TidRecord> {
        self.place(id).map(|i| &self.records[i])
    }

    /// The index of an item in [`Id2Meta::records`].
    pub fn place(&self, id: &str) -> Option<usize> {
        self.index.get(id).copied()
    }

    pub fn records(&self) -> &[TidRecord] {
        &self.records
    }

    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), StageError> {
        let mut out = vec![b'{'];
        for (i, record) in self.records.iter().enumerate() {
            if i > 0 {
                out.push(b',');
            }
            python_json::write_break(&mut out, 1);
            python_json::write_string(&mut out, record.id().as_str());
            out.extend_from_slice(b": ");
            record.fields.write_pretty(&mut out, 1);
        }
        python_json::write_break(&mut out, 0);
        out.push(b'}');
        std::fs::write(path, out).map_err(|e| StageError::io("write", path, e))
    }
}

/// Reads the object id → record into `id2meta`.
struct Entries<'r> {
    reader: &'r mut FieldsReader,
    id2meta: &'r mut Id2Meta,
}

impl<'de> DeserializeSeed<'de> for Entries<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of records")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(id) = map.next_key::<String>()? {
            let fields = map.next_value_seed(&mut *self.reader)?;
            self.id2meta.insert(TidRecord::new(ItemId(id), fields).map_err(A::Error::custom)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record(words: Value) -> Result<TidRecord, String> {
        TidRecord::from_value(json!({"id": 3, "title": " T", "summary_words": words, "extra": 1}))
    }

    #[test]
    fn only_five_words_that_are_not_blank_are_a_valid_tid() {
        for (words, valid) in [
            (json!(["a", "b", "c", "d", "e"]), true),
            (json!(["[a]", "b]", "c", "d", "e"]), true),
            (json!(["a", "b", "c", "d", " "]), false),
            (json!(["a", "b", "c", "d", "[]"]), false),
            (json!(["a", "b", "c", "d"]), false),
            (json!([]), false),
        ] {
            assert_eq!(record(words.clone()).unwrap().has_valid_tid(), valid, "{words}");
        }
        assert_eq!(record(json!(["[a]", "b]", "c", "d", "e"])).unwrap().tid_key(), "a,b,c,d,e");
        assert!(record(json!([1])).unwrap_err().contains("not a list of strings"));
        assert!(record(json!("a")).unwrap_err().contains("not a list of strings"));
    }

    #[test]
    fn a_later_record_replaces_an_earlier_one_at_its_place() {
        let make = |id: &str, title: &str| {
            TidRecord::from_value(json!({"id": id, "title": title, "summary_words": []})).unwrap()
        };
        let mut id2meta = Id2Meta::default();
        assert!(id2meta.insert(make("1", "old")).is_none());
        assert!(id2meta.insert(make("2", "x")).is_none());
        assert_eq!(id2meta.insert(make("1", "new")).unwrap().title().as_deref(), Some("old"));
        assert_eq!(id2meta.records().iter().map(|r| r.id().as_str()).collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!(id2meta.get("1").unwrap().title().as_deref(), Some("new"));
    }
}
