//! The JSON Schema of a pipeline file: the types of `spec`, and each kind's parameters under its `uses`.
//!
//! It marks no file that `grlm` takes: every value may be a reference to a variable, and a file that extends another
//! needs to say only what differs.

#[cfg(test)]
mod validate;

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
    definitions.values_mut().for_each(take_references);
    definitions.insert("variant".into(), variant);
    for (block, one) in [("stages", "stage"), ("variants", "variant")] {
        // In a file that extends another, `null` takes one out.
        definitions[one]["type"] = json!(["object", "null"]);
        root["properties"][block]["additionalProperties"] = json!({"$ref": format!("#/$defs/{one}")});
    }
    for block in ["vars", "variants"] {
        root["properties"][block]["type"] = json!(["object", "null"]);
    }
    require_the_whole(&mut root, &mut definitions);
    root["$defs"] = Value::Object(definitions);
    root
}

/// Moves what is required to the files that extend no other. There `null` removes nothing, either.
fn require_the_whole(root: &mut Value, definitions: &mut Map<String, Value>) {
    let of_file = take(root, "required");
    let of_stage = definitions.get_mut("stage").and_then(|stage| take(stage, "required"));
    root["if"] = json!({"properties": {"extends": {"type": "string"}}, "required": ["extends"]});
    root["else"] = json!({
        "properties": {
            "stages": {"additionalProperties": {"type": "object", "required": of_stage}},
            "variants": {"additionalProperties": {"type": "object"}},
        },
        "required": of_file,
    });
}

fn take(schema: &mut Value, key: &str) -> Option<Value> {
    schema.as_object_mut()?.shift_remove(key)
}

/// Lets a text that refers to a variable stand for every value below this schema that is not a text anyway.
fn take_references(schema: &mut Value) {
    let Some(keywords) = schema.as_object_mut() else { return };
    for (keyword, value) in keywords {
        match (keyword.as_str(), value) {
            ("properties", Value::Object(properties)) => properties.values_mut().for_each(or_reference),
            ("items" | "additionalProperties", value @ Value::Object(_)) => or_reference(value),
            ("anyOf" | "oneOf", Value::Array(choices)) => choices.iter_mut().for_each(take_references),
            _ => {}
        }
    }
}

fn or_reference(schema: &mut Value) {
    take_references(schema);
    let Some(own) = schema.as_object_mut() else { return };
    let fixed = ["enum", "const", "pattern"].iter().any(|keyword| own.contains_key(*keyword));
    let types = own.get("type").into_iter().flat_map(|t| t.as_array().map_or(std::slice::from_ref(t), Vec::as_slice));
    let free_text = types.clone().any(|t| t == "string") && !fixed;
    let anything = !fixed && types.count() == 0 && !["$ref", "anyOf", "oneOf"].iter().any(|k| own.contains_key(*k));
    if free_text || anything {
        return;
    }
    // Editors show these where they stand beside the choice.
    let mut choice = Map::new();
    for keyword in ["title", "description", "default"] {
        if let Some(value) = own.shift_remove(keyword) {
            choice.insert(keyword.to_owned(), value);
        }
    }
    choice.insert(
        "anyOf".to_owned(),
        json!([Value::Object(std::mem::take(own)), {"type": "string", "pattern": REFERENCE}]),
    );
    *own = choice;
}

/// A text with a reference in it.
const REFERENCE: &str = r"\$\{";

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
    use std::{
        fs,
        path::{Path, PathBuf},
    };

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

    /// What the schema says of a file's text.
    fn marked(text: &str) -> Vec<String> {
        validate::mistakes(&serde_yaml::from_str(text).unwrap(), &schema())
    }

    fn pipelines(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pipelines(&path, found);
            } else if path.extension().is_some_and(|e| e == "yaml") {
                found.push(path);
            }
        }
    }

    #[test]
    fn what_ships_is_not_marked() {
        let mut files = Vec::new();
        pipelines(&Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines"), &mut files);
        assert!(files.len() > 5);
        for file in files {
            let wrong = marked(&fs::read_to_string(&file).unwrap());
            assert!(wrong.is_empty(), "{}: {wrong:#?}", file.display());
        }
    }

    #[test]
    fn references_nulls_and_partial_files_are_not_marked() {
        for text in [
            "vars:\nvariants:\nstages: { s: { uses: synth, with: { seed: '${vars.seed}' }, retries: '${vars.n}' } }",
            "stages: { s: { uses: train, with: { architecture: { heads: '${vars.h}' }, method: '${vars.m}' } } }",
            "stages: { s: { uses: evaluate, with: { k: ['${vars.k}', 10] }, resources: { cpus: '${vars.c}' } } }",
            "stages: { s: { uses: train, with: { lr: 3e-3 } } }",
            "extends: a.yaml\nstages: { s: null, t: { with: { seed: 1 } } }\nvars: null\nvariants: { v: null }",
            "extends: a.yaml\nname: b",
        ] {
            assert!(marked(text).is_empty(), "{text}: {:#?}", marked(text));
        }
    }

    #[test]
    fn wrong_files_are_marked() {
        for (text, place) in [
            ("stages: { s: { uses: synth, with: { seed: many } } }", "stages.s.with.seed"),
            ("stages: { s: { uses: synth, with: { sede: 1 } } }", "stages.s.with.sede"),
            ("stages: { s: { uses: train, with: { architecture: { heads: two } } } }", "stages.s.with.architecture"),
            ("stages: { s: { with: {} } }", "stages.s"),
            ("stages: { s: null }", "stages.s"),
            ("stages: { s: { uses: synht } }", "stages.s.uses"),
            ("stages: { s: { uses: synth, retries: -1 } }", "stages.s.retries"),
            ("stages: []", "stages"),
            ("name: x", ""),
            ("extends: a.yaml\nstages: { s: { wiht: {} } }", "stages.s.wiht"),
        ] {
            let wrong = marked(text);
            assert!(wrong.iter().any(|w| w.starts_with(&format!("{place}: "))), "{text}: {wrong:#?}");
        }
    }
}
