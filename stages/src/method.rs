//! The `encoder` and `extractor` parameters: a built-in method by name, or a model from the hub.
//!
//! Written as `tfidf`, as `{ tfidf: { …its settings… } }`, or as `{ model: NAME, …the model's settings… }`. Running a
//! model is the inference engine's business.

use std::{borrow::Cow, fmt, marker::PhantomData};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{DeserializeOwned, Error, MapAccess, Visitor, value::MapAccessDeserializer},
    ser::SerializeMap,
};
use serde_json::{Map, Value};

/// The settings of a method that needs no model, and the method's name.
pub trait BuiltIn: Default + Serialize + DeserializeOwned + JsonSchema {
    const NAME: &'static str;
}

/// A method without a model, or a model.
#[derive(Debug, Clone, PartialEq)]
pub enum Method<B, M> {
    BuiltIn(B),
    Model(M),
}

impl<B: BuiltIn, M> Default for Method<B, M> {
    fn default() -> Self {
        Self::BuiltIn(B::default())
    }
}

impl<B: BuiltIn, M: Serialize> Serialize for Method<B, M> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::BuiltIn(settings) => {
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry(B::NAME, settings)?;
                map.end()
            }
            Self::Model(model) => model.serialize(serializer),
        }
    }
}

impl<'de, B: BuiltIn, M: DeserializeOwned> Deserialize<'de> for Method<B, M> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(MethodVisitor(PhantomData))
    }
}

struct MethodVisitor<B, M>(PhantomData<(B, M)>);

impl<'de, B: BuiltIn, M: DeserializeOwned> Visitor<'de> for MethodVisitor<B, M> {
    type Value = Method<B, M>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{name}`, `{{ {name}: {{…}} }}` or `{{ model: NAME }}`", name = B::NAME)
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Self::Value, E> {
        if name == B::NAME {
            Ok(Method::default())
        } else {
            Err(E::invalid_value(serde::de::Unexpected::Str(name), &self))
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        let mut fields = Map::deserialize(MapAccessDeserializer::new(map))?;
        match fields.remove(B::NAME) {
            None => serde_json::from_value(Value::Object(fields)).map(Method::Model).map_err(A::Error::custom),
            Some(_) if !fields.is_empty() => {
                Err(A::Error::custom(format!("`{}` stands beside other settings; choose one method", B::NAME)))
            }
            Some(Value::Null) => Ok(Method::default()),
            Some(settings) => serde_json::from_value(settings).map(Method::BuiltIn).map_err(A::Error::custom),
        }
    }
}

impl<B: BuiltIn, M: JsonSchema> JsonSchema for Method<B, M> {
    fn schema_name() -> Cow<'static, str> {
        format!("Method_{}_or_{}", B::NAME, M::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let (settings, model) = (generator.subschema_for::<B>(), generator.subschema_for::<M>());
        json_schema!({
            "oneOf": [
                {"const": B::NAME},
                {"type": "object", "properties": {B::NAME: settings}, "required": [B::NAME], "additionalProperties": false},
                model,
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[derive(Debug, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    struct Plain {
        depth: u32,
    }

    impl BuiltIn for Plain {
        const NAME: &'static str = "plain";
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Model {
        model: String,
    }

    type Choice = Method<Plain, Model>;

    #[test]
    fn every_way_of_writing_it() {
        let read = |value: Value| serde_json::from_value::<Choice>(value).map_err(|e| e.to_string());
        assert_eq!(read(json!("plain")), Ok(Choice::default()));
        assert_eq!(read(json!({"plain": null})), Ok(Choice::default()));
        assert_eq!(read(json!({"plain": {"depth": 3}})), Ok(Method::BuiltIn(Plain { depth: 3 })));
        assert_eq!(read(json!({"model": "m"})), Ok(Method::Model(Model { model: "m".into() })));
        for (wrong, words) in [
            (json!("plane"), "expected `plain`"),
            (json!(3), "expected `plain`"),
            (json!({"plain": {"deep": 1}}), "unknown field `deep`"),
            (json!({"plain": {}, "model": "m"}), "choose one"),
            (json!({"mode": "m"}), "unknown field `mode`"),
            (json!({}), "missing field `model`"),
        ] {
            let error = read(wrong).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn defaults_are_spelled_out() {
        assert_eq!(serde_json::to_value(Choice::default()).unwrap(), json!({"plain": {"depth": 0}}));
        let schema = schemars::schema_for!(Choice).to_value();
        assert_eq!(schema["oneOf"][0], json!({"const": "plain"}));
    }
}
