//! Holds a value against a JSON Schema, as an editor does. Knows the keywords that ours uses, and refuses any other.

use serde_json::Value;

/// What is wrong with `value`, each with its place.
pub fn mistakes(value: &Value, schema: &Value) -> Vec<String> {
    let mut found = Vec::new();
    Validator { root: schema, at: Vec::new(), found: &mut found }.check(value, schema);
    found
}

struct Validator<'s, 'f> {
    root: &'s Value,
    at: Vec<String>,
    found: &'f mut Vec<String>,
}

impl Validator<'_, '_> {
    fn check(&mut self, value: &Value, schema: &Value) {
        let Value::Object(keywords) = schema else {
            if *schema == Value::Bool(false) {
                self.wrong("is not allowed");
            }
            return;
        };
        for (keyword, rule) in keywords {
            match keyword.as_str() {
                "title" | "description" | "default" | "format" | "$schema" | "$defs" | "then" | "else" => {}
                "$ref" => self.check(value, self.root.pointer(rule.as_str().unwrap().trim_start_matches('#')).unwrap()),
                "type" => self.expect(has_type(value, rule), &format!("is not of type {rule}")),
                "const" => self.expect(value == rule, &format!("is not {rule}")),
                "enum" => self.expect(rule.as_array().unwrap().contains(value), "is none of the choices"),
                "minimum" => self.expect(
                    value.as_f64().zip(rule.as_f64()).is_none_or(|(number, least)| number >= least),
                    "is too small",
                ),
                "pattern" => self.pattern(value, rule.as_str().unwrap()),
                "required" => self.required(value, rule),
                "properties" => self.properties(value, rule),
                "additionalProperties" => self.others(value, rule, keywords.get("properties")),
                "items" => self.items(value, rule),
                "allOf" => rule.as_array().unwrap().iter().for_each(|s| self.check(value, s)),
                "anyOf" => {
                    let fitting = self.fitting(value, rule);
                    self.expect(fitting > 0, "fits nothing");
                }
                "oneOf" => {
                    let fitting = self.fitting(value, rule);
                    self.expect(fitting == 1, &format!("fits {fitting} choices"));
                }
                "if" => {
                    let branch = if mistakes_below(value, rule, self.root) { "else" } else { "then" };
                    if let Some(schema) = keywords.get(branch) {
                        self.check(value, schema);
                    }
                }
                other => panic!("keyword `{other}` is not known here"),
            }
        }
    }

    fn wrong(&mut self, what: &str) {
        self.found.push(format!("{}: {what}", self.at.join(".")));
    }

    fn expect(&mut self, holds: bool, what: &str) {
        if !holds {
            self.wrong(what);
        }
    }

    fn below(&mut self, key: &str, value: &Value, schema: &Value) {
        self.at.push(key.to_owned());
        self.check(value, schema);
        self.at.pop();
    }

    fn fitting(&self, value: &Value, choices: &Value) -> usize {
        choices.as_array().unwrap().iter().filter(|s| !mistakes_below(value, s, self.root)).count()
    }

    /// Of patterns, the one that matters here is read; digests are taken as they are.
    fn pattern(&mut self, value: &Value, pattern: &str) {
        if let (Value::String(text), super::REFERENCE) = (value, pattern) {
            self.expect(text.contains("${"), "holds no reference");
        }
    }

    fn required(&mut self, value: &Value, rule: &Value) {
        let Value::Object(map) = value else { return };
        for key in rule.as_array().unwrap().iter().filter_map(Value::as_str) {
            self.expect(map.contains_key(key), &format!("has no `{key}`"));
        }
    }

    fn properties(&mut self, value: &Value, rule: &Value) {
        let Value::Object(map) = value else { return };
        for (key, schema) in rule.as_object().unwrap() {
            if let Some(value) = map.get(key) {
                self.below(key, value, schema);
            }
        }
    }

    fn others(&mut self, value: &Value, rule: &Value, named: Option<&Value>) {
        let Value::Object(map) = value else { return };
        for (key, value) in map.iter().filter(|(key, _)| named.is_none_or(|named| named.get(key.as_str()).is_none())) {
            self.below(key, value, rule);
        }
    }

    fn items(&mut self, value: &Value, rule: &Value) {
        for (i, value) in value.as_array().into_iter().flatten().enumerate() {
            self.below(&i.to_string(), value, rule);
        }
    }
}

fn mistakes_below(value: &Value, schema: &Value, root: &Value) -> bool {
    let mut found = Vec::new();
    Validator { root, at: Vec::new(), found: &mut found }.check(value, schema);
    !found.is_empty()
}

fn has_type(value: &Value, rule: &Value) -> bool {
    let is = |name: &Value| match name.as_str().unwrap() {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|n| n.fract() == 0.0),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("type `{other}` is not known here"),
    };
    rule.as_array().map_or_else(|| is(rule), |names| names.iter().any(is))
}
