//! Typed reading that finds every mistake and not only the first: what cannot be read is noted, taken out, and the
//! rest is read again. Also puts the deserialiser's words into the user's.

use std::collections::HashSet;

use grlm_stages::ParamIssue;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{
    hint,
    mistake::{KeyPath, Mistake, below},
};

/// Most mistakes found in one block.
const ROUNDS: usize = 64;

/// Reads `value`, which stands at `at`, as a `T`. With mistakes, the result is what the rest of the block says, if
/// that can be read.
pub(crate) fn typed<T: DeserializeOwned>(
    value: &Value,
    at: &[String],
    poisoned: &HashSet<KeyPath>,
    mistakes: &mut Vec<Mistake>,
) -> Option<T> {
    // The common case, without the bookkeeping of paths.
    if let Ok(read) = T::deserialize(value) {
        return Some(read);
    }
    every_mistake(value, at, poisoned, mistakes, |value| {
        serde_path_to_error::deserialize(value).map_err(|e: serde_path_to_error::Error<serde_json::Error>| {
            let path = e.path().to_string();
            vec![ParamIssue::new(if path == "." { String::new() } else { path }, e.into_inner().to_string())]
        })
    })
}

/// Calls `read` again and again, each time without what it complained about. Values at `poisoned` places are known
/// to be wrong, and are not complained about again.
pub(crate) fn every_mistake<T>(
    value: &Value,
    at: &[String],
    poisoned: &HashSet<KeyPath>,
    mistakes: &mut Vec<Mistake>,
    read: impl Fn(&Value) -> Result<T, Vec<ParamIssue>>,
) -> Option<T> {
    let mut rest = value.clone();
    let mut removed: Vec<KeyPath> = Vec::new();
    for _ in 0..ROUNDS {
        let issues = match read(&rest) {
            Ok(read) => return Some(read),
            Err(issues) => issues,
        };
        let before = removed.len();
        for issue in issues {
            let mut place = keys(&issue.path);
            if let Some(field) = quoted_after(&issue.message, "missing field ") {
                place.push(field.to_owned());
                if !removed.contains(&place) {
                    place.pop();
                    mistakes
                        .push(Mistake::key(&below(at, &place), format!("`{field}` is missing")).maybe_help(issue.help));
                }
                continue;
            }
            if let Some(field) = quoted_after(&issue.message, "unknown field ")
                && place.last().is_none_or(|last| last != field)
            {
                place.push(field.to_owned());
            }
            let unknown = issue.message.starts_with("unknown field ");
            // A place that was taken out: this is about its default. And a wrong value does not excuse a wrong key.
            if !removed.contains(&place) && (unknown || !poisoned.contains(&below(at, &place))) {
                let mistake = in_plain_words(&below(at, &place), &issue);
                if !mistakes.contains(&mistake) {
                    mistakes.push(mistake);
                }
            }
            if remove(&mut rest, &place) {
                removed.push(place);
            }
        }
        if removed.len() == before {
            return None;
        }
    }
    None
}

/// `extractor.models[0].name` → its keys.
pub(crate) fn keys(path: &str) -> KeyPath {
    path.split(['.', '[', ']']).filter(|k| !k.is_empty()).map(str::to_owned).collect()
}

fn remove(value: &mut Value, path: &[String]) -> bool {
    let Some((last, parents)) = path.split_last() else { return false };
    let mut node = &mut *value;
    for key in parents {
        let next = match node {
            Value::Object(map) => map.get_mut(key),
            Value::Array(list) => key.parse::<usize>().ok().and_then(|i| list.get_mut(i)),
            _ => None,
        };
        match next {
            Some(next) => node = next,
            None => return false,
        }
    }
    match node {
        Value::Object(map) => map.shift_remove(last).is_some(),
        // Taking one out would renumber the rest: the list goes.
        Value::Array(_) => remove(value, parents),
        _ => false,
    }
}

fn quoted_after<'m>(message: &'m str, words: &str) -> Option<&'m str> {
    message.strip_prefix(words)?.strip_prefix('`')?.split('`').next()
}

/// What the deserialiser says, as a fragment that a user of YAML understands.
fn in_plain_words(place: &[String], issue: &ParamIssue) -> Mistake {
    let message = &issue.message;
    for (words, what) in [("unknown field ", "unknown key"), ("unknown variant ", "unknown value")] {
        if let Some(name) = quoted_after(message, words) {
            let known: Vec<&str> = match message.split_once(", expected ") {
                // "one of `a`, `b`" or "`a` or `b`": every second piece stands between quotes.
                Some((_, known)) => known.split('`').skip(1).step_by(2).collect(),
                None => Vec::new(),
            };
            let text = format!("{what} `{name}`");
            let mistake = if what == "unknown key" { Mistake::key(place, text) } else { Mistake::value(place, text) };
            return mistake.maybe_help(issue.help.clone().or_else(|| hint::help(name, known)));
        }
    }
    let text = ["invalid type: ", "invalid value: ", "invalid length "]
        .iter()
        .find_map(|prefix| message.strip_prefix(prefix))
        .and_then(|rest| rest.split_once(", expected "))
        .map_or_else(
            || message.clone(),
            |(found, expected)| format!("expected {}, found {}", expectation(expected), finding(found)),
        );
    Mistake::value(place, text).maybe_help(issue.help.clone())
}

fn expectation(expected: &str) -> String {
    match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number that is not negative".to_owned(),
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "a boolean" => "`true` or `false`".to_owned(),
        "a string" => "text".to_owned(),
        "a sequence" => "a list".to_owned(),
        other if other.starts_with("struct ") => "a map of keys".to_owned(),
        other => other.to_owned(),
    }
}

fn finding(found: &str) -> String {
    match found {
        "map" => "a map".to_owned(),
        "sequence" => "a list".to_owned(),
        "null" | "unit value" => "nothing".to_owned(),
        other => {
            // `string "abc"`, `integer `3``, `boolean `true``, `floating point `0.5``
            let quoted = other.split_once(['"', '`']).map(|(_, rest)| rest.trim_end_matches(['"', '`']));
            quoted.map_or_else(|| other.to_owned(), |text| format!("`{text}`"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Block {
        wanted: String,
        #[serde(default)]
        count: u32,
        #[serde(default)]
        inner: Inner,
        #[serde(default)]
        list: Vec<u32>,
    }

    #[derive(Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "snake_case")]
    #[allow(dead_code)]
    struct Inner {
        #[serde(default)]
        rate: f64,
        #[serde(default)]
        mode: Option<Mode>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Mode {
        Full,
        Allowed,
    }

    fn mistakes(value: &Value) -> Vec<String> {
        let mut found = Vec::new();
        typed::<Block>(value, &[], &HashSet::new(), &mut found);
        found
            .iter()
            .map(|m| format!("{}: {} ({})", m.path.join("."), m.message, m.help.as_deref().unwrap_or("-")))
            .collect()
    }

    #[test]
    fn an_unknown_key_is_named_although_its_value_is_wrong_too() {
        let poisoned = HashSet::from([vec!["wnated".to_owned()], vec!["count".to_owned()]]);
        let mut found = Vec::new();
        typed::<Block>(&json!({"wanted": "a", "wnated": "${x}", "count": "${x}"}), &[], &poisoned, &mut found);
        assert_eq!(found.iter().map(|m| m.message.as_str()).collect::<Vec<_>>(), ["unknown key `wnated`"]);
    }

    /// Without the value that is wrong the default stands there, which may be no better.
    #[test]
    fn a_check_that_the_default_fails_too_is_told_once() {
        let read = |value: &Value| -> Result<(), Vec<ParamIssue>> {
            let (heads, kv_heads) = (value["heads"].as_u64().unwrap_or(4), value["kv_heads"].as_u64().unwrap_or(4));
            let wrong = || ParamIssue::new("kv_heads", format!("{kv_heads} does not divide {heads}"));
            if heads % kv_heads == 0 { Ok(()) } else { Err(vec![wrong()]) }
        };
        let mut found = Vec::new();
        every_mistake(&json!({"heads": 3, "kv_heads": 2}), &[], &HashSet::new(), &mut found, read);
        assert_eq!(found.iter().map(|m| m.message.as_str()).collect::<Vec<_>>(), ["2 does not divide 3"]);
    }

    #[test]
    fn every_mistake_is_found() {
        insta::assert_snapshot!(
            mistakes(&json!({
                "wanted": 3, "count": -1, "cuont": 2, "list": [1, "x"],
                "inner": {"rate": "fast", "mode": "ful", "extra": {}},
            })).join("\n"),
            @r"
        wanted: expected text, found `3` (-)
        count: expected a whole number that is not negative, found `-1` (-)
        cuont: unknown key `cuont` (did you mean `count`?)
        list.1: expected a whole number that is not negative, found `x` (-)
        inner.rate: expected a number, found `fast` (-)
        inner.mode: unknown value `ful` (did you mean `full`?)
        inner.extra: unknown key `extra` (known: rate, mode)
        "
        );
        assert_eq!(mistakes(&json!({})), ["`wanted` is missing".to_owned()].map(|m| format!(": {m} (-)")));
        assert_eq!(mistakes(&json!([1])).len(), 1);
    }
}
