//! The key of a row: a BLAKE3 hash of named fields, each with its type and length in front, so that no two
//! different sets of fields are hashed as the same bytes.

use std::fmt;

use serde_json::Value;

/// Raised whenever the encoding below changes.
const FORMAT: u32 = 1;

/// Names all that the result of a row depends on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowKey([u8; 32]);

impl RowKey {
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for RowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for RowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RowKey({self})")
    }
}

/// What the keys of one job share: the namespace, the version of the code that makes a row, and fields such as a
/// model's digest. Cheap to go on from for each row: see [`RowRecipe::row`].
#[derive(Clone)]
pub struct RowRecipe {
    fields: RowFields,
}

impl RowRecipe {
    /// `version` is the row's own: raised when the code computes something else from the same fields.
    pub fn new(namespace: &str, version: u32) -> Self {
        let fields = RowFields(blake3::Hasher::new());
        Self {
            fields: fields
                .number("format", FORMAT.into())
                .text("namespace", namespace)
                .number("version", version.into()),
        }
    }

    pub fn text(self, name: &str, value: &str) -> Self {
        Self { fields: self.fields.text(name, value) }
    }

    pub fn bytes(self, name: &str, value: &[u8]) -> Self {
        Self { fields: self.fields.bytes(name, value) }
    }

    pub fn number(self, name: &str, value: u64) -> Self {
        Self { fields: self.fields.number(name, value) }
    }

    pub fn json(self, name: &str, value: &Value) -> Self {
        Self { fields: self.fields.json(name, value) }
    }

    /// The fields of one row, after the shared ones.
    pub fn row(&self) -> RowFields {
        self.fields.clone()
    }
}

/// Fields of one row. The order in which they are given is part of the key.
#[derive(Clone)]
pub struct RowFields(blake3::Hasher);

impl RowFields {
    pub fn text(self, name: &str, value: &str) -> Self {
        self.field(b't', name, value.as_bytes())
    }

    pub fn bytes(self, name: &str, value: &[u8]) -> Self {
        self.field(b'b', name, value)
    }

    pub fn number(self, name: &str, value: u64) -> Self {
        self.field(b'n', name, &value.to_le_bytes())
    }

    /// A JSON value in canonical form: the order of an object's names does not matter; `1`, `1.0` and `"1"` differ.
    pub fn json(self, name: &str, value: &Value) -> Self {
        let mut text = String::new();
        canonical(value, &mut text);
        self.field(b'j', name, text.as_bytes())
    }

    pub fn key(&self) -> RowKey {
        RowKey(*self.0.finalize().as_bytes())
    }

    fn field(mut self, kind: u8, name: &str, value: &[u8]) -> Self {
        let mut head = [0u8; 17];
        head[0] = kind;
        head[1..9].copy_from_slice(&(name.len() as u64).to_le_bytes());
        head[9..].copy_from_slice(&(value.len() as u64).to_le_bytes());
        self.0.update(&head).update(name.as_bytes()).update(value);
        self
    }
}

fn canonical(value: &Value, out: &mut String) {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<(&String, &Value)> = map.iter().collect();
            entries.sort_unstable_by_key(|(name, _)| *name);
            out.push('{');
            for (i, (name, value)) in entries.into_iter().enumerate() {
                out.push_str(if i > 0 { "," } else { "" });
                out.push_str(&Value::String(name.clone()).to_string());
                out.push(':');
                canonical(value, out);
            }
            out.push('}');
        }
        Value::Array(list) => {
            out.push('[');
            for (i, value) in list.iter().enumerate() {
                out.push_str(if i > 0 { "," } else { "" });
                canonical(value, out);
            }
            out.push(']');
        }
        leaf => out.push_str(&leaf.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_part_counts_and_boundaries_are_kept() {
        let base = || RowRecipe::new("embed", 1).text("model", "m");
        let keys = [
            base().row().text("text", "ab").key(),
            base().row().text("text", "a").text("text", "b").key(),
            base().row().text("texta", "b").key(),
            base().row().bytes("text", b"ab").key(),
            base().row().json("text", &json!("ab")).key(),
            RowRecipe::new("embed", 2).text("model", "m").row().text("text", "ab").key(),
            RowRecipe::new("embe", 1).text("model", "m").row().text("text", "ab").key(),
            RowRecipe::new("embed", 1).text("model", "n").row().text("text", "ab").key(),
        ];
        let distinct: std::collections::HashSet<_> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
        assert_eq!(keys[0], base().row().text("text", "ab").key());
    }

    #[test]
    fn json_is_canonical_in_order_and_exact_in_type() {
        let key = |value: Value| RowRecipe::new("n", 1).json("v", &value).row().key();
        assert_eq!(key(json!({"a": [1, {"x": 1, "b": 2}], "b": null})), {
            key(serde_json::from_str(r#"{"b": null, "a": [1, {"b": 2, "x": 1}]}"#).unwrap())
        });
        assert_ne!(key(json!(1)), key(json!(1.0)));
        assert_ne!(key(json!(["a", "b"])), key(json!(["a,b"])));
    }

    #[test]
    fn a_key_never_changes_by_itself() {
        let key = RowRecipe::new("embed", 3).number("dim", 8).row().text("text", "red soap").key();
        assert_eq!(key.to_string(), "099fd05ce580fb81e6e674903c55b95d62d4bb7ad6f376eba94e9b3bb77903ba");
    }
}
