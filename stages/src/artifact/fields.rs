//! The fields of a JSON object as they stand in its file.
//!
//! What is plain, a string or a list of strings without escapes, stays a part of the text; everything else becomes a
//! [`Value`]. A catalogue is a dozen short strings an item, of which a builder reads few and copies the rest: taken
//! apart into values, their allocations cost several times what the work itself does.

use std::{borrow::Cow, fmt, ops::Range, sync::Arc};

use rustc_hash::FxHashSet;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer},
};
use serde_json::{Map, Value};

use super::{items, python_json};

/// An object's fields in their order. A name stands there once: a later value replaces an earlier one at its place.
#[derive(Clone, Default)]
pub struct Fields {
    text: Arc<String>,
    list: Vec<(Arc<str>, Stored)>,
}

#[derive(Clone)]
enum Stored {
    /// What is between the quotes of a string.
    Text(Range<usize>),
    /// The strings of a list, from the first quote to the last.
    Texts(Range<usize>),
    Value(Value),
}

impl Stored {
    fn field<'a>(&'a self, text: &'a str) -> Field<'a> {
        match self {
            Self::Text(place) => Field::Text(&text[place.clone()]),
            Self::Texts(place) => Field::Texts(Texts(&text[place.clone()])),
            Self::Value(value) => Field::Value(value),
        }
    }

    fn into_value(self, text: &str) -> Value {
        match self {
            Self::Value(value) => value,
            other => other.field(text).to_value(),
        }
    }
}

/// The value of a field.
#[derive(Debug, Clone)]
pub enum Field<'a> {
    Text(&'a str),
    Texts(Texts<'a>),
    Value(&'a Value),
}

/// The strings of a list without escapes.
#[derive(Debug, Clone)]
pub struct Texts<'a>(&'a str);

impl<'a> Iterator for Texts<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let rest = &self.0[quote(self.0)? + 1..];
        let end = quote(rest)?;
        self.0 = &rest[end + 1..];
        Some(&rest[..end])
    }
}

/// The place of the first quote. Strings are short, and a search for a character in general costs more.
fn quote(text: &str) -> Option<usize> {
    text.bytes().position(|b| b == b'"')
}

impl Fields {
    pub fn get(&self, name: &str) -> Option<Field<'_>> {
        self.place(name).and_then(|place| self.at(place))
    }

    /// The place of a field, which stays what it is.
    pub fn place(&self, name: &str) -> Option<usize> {
        self.list.iter().position(|(known, _)| **known == *name)
    }

    pub fn at(&self, place: usize) -> Option<Field<'_>> {
        self.list.get(place).map(|(_, stored)| self.field(stored))
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, Field<'_>)> {
        self.list.iter().map(|(name, stored)| (&**name, self.field(stored)))
    }

    pub fn set(&mut self, name: &str, value: Value) {
        self.put(name.into(), Stored::Value(value));
    }

    pub fn to_map(&self) -> Map<String, Value> {
        self.iter().map(|(name, field)| (name.to_owned(), field.to_value())).collect()
    }

    /// Appends the object over several lines, as `python_json::write_object` does.
    pub fn write_pretty(&self, out: &mut Vec<u8>, level: usize) {
        python_json::write_pretty_fields(out, self.iter(), level, |out, field, level| field.write_pretty(out, level));
    }

    /// Appends the object on one line.
    pub fn write_line(&self, out: &mut Vec<u8>) {
        python_json::write_line_fields(out, self.iter(), |out, field| field.write_line(out));
    }

    fn field<'a>(&'a self, stored: &'a Stored) -> Field<'a> {
        stored.field(&self.text)
    }

    fn put(&mut self, name: Arc<str>, stored: Stored) {
        match self.list.iter_mut().find(|(known, _)| *known == name) {
            Some((_, slot)) => *slot = stored,
            None => self.list.push((name, stored)),
        }
    }
}

impl From<Map<String, Value>> for Fields {
    fn from(fields: Map<String, Value>) -> Self {
        let list = fields.into_iter().map(|(name, value)| (name.into(), Stored::Value(value))).collect();
        Self { text: Arc::default(), list }
    }
}

impl PartialEq for Fields {
    fn eq(&self, other: &Self) -> bool {
        self.to_map() == other.to_map()
    }
}

impl fmt::Debug for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<'a> Field<'a> {
    pub fn to_value(&self) -> Value {
        match self {
            Self::Text(text) => Value::String((*text).to_owned()),
            Self::Texts(texts) => texts.clone().map(|t| Value::String(t.to_owned())).collect(),
            Self::Value(value) => (*value).clone(),
        }
    }

    /// As text, see [`items::Item::text`].
    pub fn text(self) -> Option<Cow<'a, str>> {
        let text = match self {
            Self::Text(text) => Cow::Borrowed(text.trim()),
            Self::Texts(texts) => {
                Cow::Owned(texts.map(str::trim).filter(|t| !t.is_empty()).collect::<Vec<_>>().join(" "))
            }
            Self::Value(value) => return items::value_text(value),
        };
        (!text.is_empty()).then_some(text)
    }

    /// `str(value)` of Python.
    pub fn python_str(&self) -> Cow<'a, str> {
        match self {
            Self::Text(text) => Cow::Borrowed(text),
            Self::Texts(_) => Cow::Owned(python_json::python_str(&self.to_value())),
            Self::Value(Value::String(text)) => Cow::Borrowed(text),
            Self::Value(value) => Cow::Owned(python_json::python_str(value)),
        }
    }

    /// Whether Python takes the value for true.
    pub fn is_truthy(&self) -> bool {
        match self {
            Self::Text(text) => !text.is_empty(),
            Self::Texts(texts) => texts.clone().next().is_some(),
            Self::Value(value) => python_json::is_truthy(value),
        }
    }

    fn write_pretty(self, out: &mut Vec<u8>, level: usize) {
        match self {
            Self::Text(text) => write_quoted(out, text),
            Self::Texts(texts) => {
                python_json::write_pretty_list(out, texts, level, |out, text, _| write_quoted(out, text))
            }
            Self::Value(value) => python_json::write_pretty(out, value, level),
        }
    }

    fn write_line(self, out: &mut Vec<u8>) {
        match self {
            Self::Text(text) => write_quoted(out, text),
            Self::Texts(texts) => python_json::write_line_list(out, texts, write_quoted),
            Self::Value(value) => python_json::write_line(out, value),
        }
    }
}

/// A string that has nothing to escape.
fn write_quoted(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    out.extend_from_slice(text.as_bytes());
    out.push(b'"');
}

/// Reads objects of one text. Their names are kept once.
pub struct FieldsReader {
    text: Arc<String>,
    names: FxHashSet<Arc<str>>,
}

impl FieldsReader {
    pub fn new(text: String) -> Self {
        Self { text: Arc::new(text), names: FxHashSet::default() }
    }

    pub fn text(&self) -> Arc<String> {
        Arc::clone(&self.text)
    }

    fn name(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.names.get(name) {
            return Arc::clone(known);
        }
        let new: Arc<str> = name.into();
        self.names.insert(Arc::clone(&new));
        new
    }
}

/// Reads an object of the reader's text; `&mut reader` is the seed.
impl<'de> DeserializeSeed<'de> for &mut FieldsReader {
    type Value = Fields;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Fields, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut FieldsReader {
    type Value = Fields;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of fields")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
        let mut fields = Fields { text: self.text(), list: Vec::with_capacity(8) };
        while let Some(name) = map.next_key_seed(NameSeed(self))? {
            fields.put(name, map.next_value_seed(StoredSeed(&self.text))?);
        }
        Ok(fields)
    }
}

struct NameSeed<'r>(&'r mut FieldsReader);

impl<'de> DeserializeSeed<'de> for NameSeed<'_> {
    type Value = Arc<str>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Arc<str>, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for NameSeed<'_> {
    type Value = Arc<str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a field")
    }

    fn visit_str<E>(self, name: &str) -> Result<Arc<str>, E> {
        Ok(self.0.name(name))
    }
}

/// Reads a value that is part of the text. A string is borrowed from it if it has no escapes.
struct StoredSeed<'r>(&'r str);

impl StoredSeed<'_> {
    /// Where in the text `part` stands.
    fn place(&self, part: &str) -> Option<Range<usize>> {
        let start = (part.as_ptr() as usize).checked_sub(self.0.as_ptr() as usize)?;
        let place = start..start + part.len();
        self.0.get(place.clone()).is_some_and(|found| std::ptr::eq(found, part)).then_some(place)
    }
}

impl<'de> DeserializeSeed<'de> for StoredSeed<'_> {
    type Value = Stored;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Stored, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for StoredSeed<'_> {
    type Value = Stored;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Stored, E> {
        Ok(self.place(text).map_or_else(|| Stored::Value(text.into()), Stored::Text))
    }

    fn visit_str<E>(self, text: &str) -> Result<Stored, E> {
        Ok(Stored::Value(text.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Stored, A::Error> {
        let mut places: Option<Range<usize>> = None;
        while let Some(item) = items.next_element_seed(StoredSeed(self.0))? {
            let Stored::Text(place) = item else {
                let before = places.iter().flat_map(|places| Texts(&self.0[places.clone()])).map(Value::from);
                let mut values: Vec<Value> = before.chain([item.into_value(self.0)]).collect();
                while let Some(value) = items.next_element()? {
                    values.push(value);
                }
                return Ok(Stored::Value(Value::Array(values)));
            };
            // Quotes included: what stands between the first and the last is known to be commas and white space.
            places = Some(places.map_or(place.start - 1, |known| known.start)..place.end + 1);
        }
        Ok(Stored::Texts(places.unwrap_or_default()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Stored, A::Error> {
        Value::deserialize(MapAccessDeserializer::new(map)).map(Stored::Value)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Stored, E> {
        Ok(Stored::Value(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Stored, E> {
        Ok(Stored::Value(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Stored, E> {
        Ok(Stored::Value(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Stored, E> {
        Ok(Stored::Value(value.into()))
    }

    fn visit_unit<E>(self) -> Result<Stored, E> {
        Ok(Stored::Value(Value::Null))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(text: &str) -> Result<Fields, serde_json::Error> {
        let mut reader = FieldsReader::new(text.to_owned());
        let text = reader.text();
        let mut deserializer = serde_json::Deserializer::from_str(&text);
        let fields = (&mut reader).deserialize(&mut deserializer)?;
        deserializer.end()?;
        Ok(fields)
    }

    const TEXT: &str = r#" {"a" : "plain é", "esc": "q\" \u00e9\/", "list": ["x", "[y, {"] , "none": [], "mixed": ["x", 1],
        "nested": [["x"], ["y"]], "escaped list": ["a\\b"], "n": 1.50, "o": {"b": null}, "a\tb": " ", "blank": ""} "#;

    #[test]
    fn every_value_comes_out_as_if_it_had_been_taken_apart() {
        let fields = read(TEXT).unwrap();
        let map: Map<String, Value> = serde_json::from_str(TEXT).unwrap();
        assert_eq!(fields.to_map(), map);
        assert_eq!(fields, Fields::from(map.clone()));
        for (name, value) in &map {
            let field = || fields.get(name).unwrap();
            assert_eq!(field().python_str(), python_json::python_str(value), "{name}");
            assert_eq!(field().is_truthy(), python_json::is_truthy(value), "{name}");
            assert_eq!(field().text(), items::value_text(value), "{name}");
        }
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        fields.write_pretty(&mut ours, 3);
        python_json::write_object(&mut theirs, &map, 3);
        assert_eq!(String::from_utf8(ours).unwrap(), String::from_utf8(theirs).unwrap());
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        fields.write_line(&mut ours);
        python_json::write_line(&mut theirs, &Value::Object(map));
        assert_eq!(String::from_utf8(ours).unwrap(), String::from_utf8(theirs).unwrap());
    }

    #[test]
    fn plain_values_stay_in_the_text() {
        let fields = read(TEXT).unwrap();
        let plain = |name| !matches!(fields.get(name), Some(Field::Value(_)) | None);
        assert!(["a", "list", "none", "a\tb", "blank"].into_iter().all(plain));
        assert!(!["esc", "mixed", "nested", "escaped list", "n", "o"].into_iter().any(plain));
        let Some(Field::Texts(texts)) = fields.get("list") else { panic!("not a list of texts") };
        assert_eq!(texts.collect::<Vec<_>>(), ["x", "[y, {"]);
    }

    #[test]
    fn a_later_value_of_a_name_replaces_the_earlier_one() {
        let mut fields = read(r#"{"a": "1", "b": "2", "a": "3"}"#).unwrap();
        fields.set("b", json!([4]));
        fields.set("c", json!(5));
        assert_eq!(serde_json::to_string(&fields.to_map()).unwrap(), r#"{"a":"3","b":[4],"c":5}"#);
    }

    #[test]
    fn broken_values_are_errors() {
        for text in [r#"{"a": 1e999}"#, r#"{"a": "\ud800"}"#, r#"{"a": tru}"#, r#"{"a": "#, "[]", r#"{"a": ["x" "y"]}"#]
        {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
