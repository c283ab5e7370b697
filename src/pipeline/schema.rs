//! The JSON Schema of a pipeline file: the types of `spec`, and each kind's parameters under its `uses`.

use serde_json::{Map, Value, json};

use super::spec::{FileSpec, StageSpec, VariantSpec};

/// The schema, for editors: draft 2020-12.
pub fn schema() -> Value {
    let mut root = schemars::schema_for!(FileSpec).to_value();
    let mut definitions = Map::new();
    let mut stage = inline(schemars::schema_for!(StageSpec).to_value(), "stage", &mut definitions);
    let variant = inline(schemars::schema_for!(VariantSpec).to_value(), "variant", &mut definitions);
    let kinds: Vec<&str> = grlm_stages::kinds().iter().map(|k| k.name()).collect();
    stage["properties"]["uses"]["enum"] = json!(kinds);
    let mut cases = Vec::new();
    for kind in grlm_stages::kinds() {
        let name = kind.name();
        let params = inline(kind.params_schema().to_value(), name, &mut definitions);
        definitions.insert(format!("{name}.with"), params);
        cases.push(json!({
            "if": {"properties": {"uses": {"const": name}}, "required": ["uses"]},
            "then": {"properties": {"with": {"$ref": format!("#/$defs/{name}.with")}}},
        }));
    }
    stage["allOf"] = Value::Array(cases);
    definitions.insert("stage".into(), stage);
    definitions.insert("variant".into(), variant);
    root["properties"]["stages"]["additionalProperties"] = json!({"$ref": "#/$defs/stage"});
    root["properties"]["variants"]["additionalProperties"] = json!({"$ref": "#/$defs/variant"});
    root["$defs"] = Value::Object(definitions);
    root
}

/// Moves a schema's own definitions, under names of their own, into the common ones.
fn inline(mut schema: Value, owner: &str, definitions: &mut Map<String, Value>) -> Value {
    let own = schema.as_object_mut().and_then(|s| s.shift_remove("$defs"));
    if let Some(object) = schema.as_object_mut() {
        object.shift_remove("$schema");
    }
    rename_references(&mut schema, owner);
    if let Some(Value::Object(own)) = own {
        for (name, mut definition) in own {
            rename_references(&mut definition, owner);
            definitions.insert(format!("{owner}.{name}"), definition);
        }
    }
    schema
}

fn rename_references(value: &mut Value, owner: &str) {
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                match value {
                    Value::String(text) if key == "$ref" => {
                        if let Some(name) = text.strip_prefix("#/$defs/") {
                            *text = format!("#/$defs/{owner}.{name}");
                        }
                    }
                    other => rename_references(other, owner),
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|v| rename_references(v, owner)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn references(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    match value {
                        Value::String(text) if key == "$ref" => found.push(text.clone()),
                        other => references(other, found),
                    }
                }
            }
            Value::Array(list) => list.iter().for_each(|v| references(v, found)),
            _ => {}
        }
    }

    #[test]
    fn every_reference_leads_somewhere_and_every_kind_is_in_it() {
        let schema = schema();
        let mut found = Vec::new();
        references(&schema, &mut found);
        assert!(!found.is_empty());
        for reference in found {
            assert!(schema.pointer(reference.trim_start_matches('#')).is_some(), "{reference}");
        }
        for kind in grlm_stages::kinds() {
            assert!(schema["$defs"].get(format!("{}.with", kind.name())).is_some());
        }
    }
}
