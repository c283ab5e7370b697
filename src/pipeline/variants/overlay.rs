//! Puts one value at a path that starts at a stage's name or at `vars`, and remembers where it was written.

use serde_json::{Map, Value};

use crate::pipeline::{
    hint,
    mistake::{KeyPath, path},
    places::{Origin, Sources},
};

/// What is wrong with a path, and what to do about it.
pub(super) type Refusal = (String, Option<String>);

/// The stages of a file, to change.
pub(super) fn stages(root: &mut Map<String, Value>) -> &mut Map<String, Value> {
    let slot = root.entry("stages").or_insert_with(|| Value::Object(Map::new()));
    if !slot.is_object() {
        *slot = Value::Object(Map::new());
    }
    slot.as_object_mut().unwrap_or_else(|| unreachable!("was made an object"))
}

/// Puts `value` at `target`; `null` removes what is there, except that a variable stays without a value.
pub(super) fn put(
    root: &mut Map<String, Value>,
    target: &str,
    value: Value,
    origin: Origin,
    sources: &mut Sources,
) -> Result<(), Refusal> {
    let at = place(root, target)?;
    let (last, parents) = at.split_last().ok_or_else(|| ("the path is empty".to_owned(), None))?;
    let mut node: &mut Map<String, Value> = root;
    for step in parents {
        let slot = node.entry(step.clone()).or_insert_with(|| Value::Object(Map::new()));
        if slot.is_null() {
            *slot = Value::Object(Map::new());
        }
        node =
            slot.as_object_mut().ok_or_else(|| (format!("`{target}` leads into `{step}`, which is no map"), None))?;
    }
    if value.is_null() && at[0] != "vars" {
        node.shift_remove(last);
    } else {
        node.insert(last.clone(), value);
    }
    sources.overlays.push((at, origin));
    Ok(())
}

/// Where `target` stands, from the root of the file.
fn place(root: &mut Map<String, Value>, target: &str) -> Result<KeyPath, Refusal> {
    let steps: Vec<&str> = target.split('.').collect();
    if steps[0] != "vars" {
        let stages = stages(root);
        if !stages.contains_key(steps[0]) {
            let help = hint::help(steps[0], stages.keys().map(String::as_str));
            return Err((format!("there is no stage `{}`", steps[0]), help));
        }
        return Ok([path(&["stages"]), path(&steps)].concat());
    }
    let Some(name) = steps.get(1) else {
        return Err(("name the variable, as in `vars.data`".into(), None));
    };
    let vars = root.entry("vars").or_insert_with(|| Value::Object(Map::new()));
    if !vars.as_object().is_some_and(|vars| vars.contains_key(*name)) {
        let known = vars.as_object().into_iter().flat_map(Map::keys).map(String::as_str);
        return Err((format!("there is no variable `{name}`"), hint::help(name, known)));
    }
    Ok(path(&steps))
}
