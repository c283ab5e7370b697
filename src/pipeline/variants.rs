//! Lays a variant, a cell of a matrix and `--set` over the tree of a pipeline file.
//!
//! A path in `set` starts at a stage's name or at `vars`; a new value replaces what is there, `null` removes it. A
//! variant that extends another is laid over it. Cells are named by their values, `lr[train.with.lr=0.0001]`.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    Selection, hint,
    mistake::{KeyPath, Mistake, PipelineErrors, path},
    places::{Origin, Sources},
    spec::VariantSpec,
};

/// More cells than this are a slip of the pen.
const MAX_CELLS: usize = 10_000;

/// One cell: its values by path.
type Cell = Vec<(String, Value)>;

/// Lays over `root` what `selection` asks for.
///
/// # Errors
/// The variant does not exist, or is a matrix that was asked for as a whole.
pub(crate) fn apply(
    root: &mut Map<String, Value>,
    selection: &Selection,
    sources: &mut Sources,
    mistakes: &mut Vec<Mistake>,
) -> Result<(), PipelineErrors> {
    let variants = match root.get("variants") {
        Some(Value::Object(map)) => map.clone(),
        _ => Map::new(),
    };
    for (name, block) in &variants {
        if let Err(error) = serde_path_to_error::deserialize::<_, VariantSpec>(block) {
            let mut at = path(&["variants", name]);
            at.extend(error.path().iter().filter_map(|s| match s {
                serde_path_to_error::Segment::Map { key } => Some(key.clone()),
                _ => None,
            }));
            mistakes.push(Mistake::key(&at, format!("in variant `{name}`: {}", error.into_inner())));
        }
    }
    if let Some(wanted) = &selection.variant {
        let (name, cell) = find(wanted, &variants)?;
        for (link, block) in chain(&name, &variants)? {
            let at = path(&["variants", &link]);
            for (stage, added) in &block.add {
                if stages(root).contains_key(stage) {
                    let message = format!("variant `{link}` adds stage `{stage}`, which is there already");
                    mistakes.push(Mistake::key(&[at.clone(), path(&["add", stage])].concat(), message));
                    continue;
                }
                stages(root).insert(stage.clone(), added.clone());
                let origin = Origin::File([at.clone(), path(&["add", stage])].concat());
                sources.overlays.push((path(&["stages", stage]), origin));
            }
            for (target, value) in &block.set {
                let origin = [at.clone(), path(&["set", target])].concat();
                put(root, target, value.clone(), Origin::File(origin.clone()), sources)
                    .unwrap_or_else(|(message, help)| mistakes.push(Mistake::key(&origin, message).maybe_help(help)));
            }
        }
        for (target, value) in cell {
            let origin = path(&["variants", &name, "matrix", &target]);
            put(root, &target, value, Origin::File(origin.clone()), sources)
                .unwrap_or_else(|(message, help)| mistakes.push(Mistake::key(&origin, message).maybe_help(help)));
        }
    }
    for (target, text) in &selection.set {
        let argument = format!("{target}={text}");
        let refused = |(message, help): (String, Option<String>)| {
            PipelineErrors::one(format!("--set {argument}: {message}"), help)
        };
        let value: Value = serde_yaml::from_str(text)
            .map_err(|e| refused((format!("not a YAML value: {e}"), Some("quote it for YAML as well".into()))))?;
        put(root, target, value, Origin::Argument(argument.clone()), sources).map_err(refused)?;
    }
    Ok(())
}

/// The names of all variants; a matrix gives one for each of its cells.
pub(crate) fn names(variants: &Map<String, Value>) -> Vec<String> {
    variants
        .iter()
        .flat_map(|(name, block)| {
            let cells = VariantSpec::deserialize(block).map(|b| cells(&b)).unwrap_or_default();
            match cells.is_empty() {
                true => vec![name.clone()],
                false => cells.iter().map(|c| cell_name(name, c)).collect(),
            }
        })
        .collect()
}

fn stages(root: &mut Map<String, Value>) -> &mut Map<String, Value> {
    let slot = root.entry("stages").or_insert_with(|| Value::Object(Map::new()));
    if !slot.is_object() {
        *slot = Value::Object(Map::new());
    }
    slot.as_object_mut().unwrap_or_else(|| unreachable!("was made an object"))
}

/// The variant's own name, and the values of the cell if one was named.
fn find(wanted: &str, variants: &Map<String, Value>) -> Result<(String, Cell), PipelineErrors> {
    let (name, inside) = match wanted.strip_suffix(']').and_then(|w| w.split_once('[')) {
        Some((name, inside)) => (name, Some(inside)),
        None => (wanted, None),
    };
    let Some(block) = variants.get(name) else {
        let help = hint::help(name, variants.keys().map(String::as_str));
        return Err(PipelineErrors::one(format!("the pipeline has no variant `{name}`"), help));
    };
    let cells = VariantSpec::deserialize(block).map(|b| cells(&b)).unwrap_or_default();
    if cells.is_empty() && inside.is_none() {
        return Ok((name.to_owned(), Cell::new()));
    }
    let found = cells
        .iter()
        .find(|cell| inside.is_some_and(|text| *wanted == cell_name(name, cell) || same_values(text, cell)));
    match found {
        Some(cell) => Ok((name.to_owned(), cell.clone())),
        None if cells.is_empty() => Err(PipelineErrors::one(format!("variant `{name}` has no matrix"), None)),
        None => {
            let all: Vec<String> = cells.iter().take(50).map(|c| cell_name(name, c)).collect();
            let message = match inside {
                Some(_) => format!("variant `{name}` has no cell `{wanted}`"),
                None => format!("variant `{name}` is a matrix of {} cells", cells.len()),
            };
            Err(PipelineErrors::one(message, Some(format!("choose one:\n{}", all.join("\n")))))
        }
    }
}

/// `text` names the same values, perhaps spelled otherwise (`1e-4` for `0.0001`).
fn same_values(text: &str, cell: &Cell) -> bool {
    let parts: Vec<&str> = text.split(',').collect();
    parts.len() == cell.len()
        && parts.iter().zip(cell).all(|(part, (target, value))| {
            part.split_once('=')
                .is_some_and(|(t, v)| t == target && serde_yaml::from_str::<Value>(v).is_ok_and(|v| v == *value))
        })
}

/// The variants to lay over each other, the base first.
fn chain(name: &str, variants: &Map<String, Value>) -> Result<Vec<(String, VariantSpec)>, PipelineErrors> {
    let mut links: Vec<(String, VariantSpec)> = Vec::new();
    let mut next = Some(name.to_owned());
    while let Some(name) = next {
        if links.iter().any(|(n, _)| *n == name) {
            return Err(PipelineErrors::one(format!("variant `{name}` extends itself"), None));
        }
        let Some(block) = variants.get(&name) else {
            let help = hint::help(&name, variants.keys().map(String::as_str));
            return Err(PipelineErrors::one(format!("there is no variant `{name}` to extend"), help));
        };
        let block = VariantSpec::deserialize(block)
            .map_err(|e| PipelineErrors::one(format!("in variant `{name}`: {e}"), None))?;
        next = block.extends.clone();
        links.push((name, block));
    }
    links.reverse();
    Ok(links)
}

/// Every combination of a matrix' values, the last path changing fastest.
fn cells(block: &VariantSpec) -> Vec<Cell> {
    if block.matrix.is_empty() {
        return Vec::new();
    }
    let mut cells: Vec<Cell> = vec![Cell::new()];
    for (target, values) in &block.matrix {
        let values = values.as_array().cloned().unwrap_or_else(|| vec![values.clone()]);
        if cells.len().saturating_mul(values.len()) > MAX_CELLS {
            return cells;
        }
        cells = cells
            .into_iter()
            .flat_map(|cell| {
                values
                    .iter()
                    .map(move |v| [cell.clone(), vec![(target.clone(), v.clone())]].concat())
                    .collect::<Vec<_>>()
            })
            .collect();
    }
    cells
}

fn cell_name(name: &str, cell: &Cell) -> String {
    let parts: Vec<String> = cell
        .iter()
        .map(|(target, value)| match value {
            Value::String(text) => format!("{target}={text}"),
            other => format!("{target}={other}"),
        })
        .collect();
    format!("{name}[{}]", parts.join(","))
}

type Refusal = (String, Option<String>);

/// Puts a value at a path that starts at a stage's name or at `vars`.
fn put(
    root: &mut Map<String, Value>,
    target: &str,
    value: Value,
    origin: Origin,
    sources: &mut Sources,
) -> Result<(), Refusal> {
    let steps: Vec<&str> = target.split('.').collect();
    let (first, rest) = steps.split_first().ok_or_else(|| ("the path is empty".to_owned(), None))?;
    let mut at: KeyPath;
    if *first == "vars" {
        let vars = root.entry("vars").or_insert_with(|| Value::Object(Map::new()));
        let known: Vec<String> = vars.as_object().map(|m| m.keys().cloned().collect()).unwrap_or_default();
        let Some(name) = rest.first() else {
            return Err(("name the variable, as in `vars.data`".into(), None));
        };
        if !known.iter().any(|k| k == name) {
            let help = hint::help(name, known.iter().map(String::as_str));
            return Err((format!("there is no variable `{name}`"), help));
        }
        at = path(&["vars"]);
        at.extend(rest.iter().map(|s| (*s).to_owned()));
    } else {
        if !stages(root).contains_key(*first) {
            let known: Vec<String> = stages(root).keys().cloned().collect();
            let help = hint::help(first, known.iter().map(String::as_str));
            return Err((format!("there is no stage `{first}`"), help));
        }
        at = path(&["stages"]);
        at.extend(steps.iter().map(|s| (*s).to_owned()));
    }
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
    if value.is_null() && *first != "vars" {
        node.shift_remove(last);
    } else {
        node.insert(last.clone(), value);
    }
    sources.overlays.push((at, origin));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn laid(text: &str, variant: Option<&str>, set: &[(&str, &str)]) -> Result<Value, String> {
        let mut root: Map<String, Value> = serde_yaml::from_str(text).unwrap();
        let selection = Selection {
            variant: variant.map(str::to_owned),
            set: set.iter().map(|(p, v)| ((*p).to_owned(), (*v).to_owned())).collect(),
        };
        let mut mistakes = Vec::new();
        apply(&mut root, &selection, &mut Sources::default(), &mut mistakes).map_err(|e| format!("{e}"))?;
        match mistakes.first() {
            Some(mistake) => Err(mistake.message.clone()),
            None => Ok(Value::Object(root)),
        }
    }

    const TEXT: &str = "
vars: { k: 1 }
stages: { a: { uses: x, with: { n: 5, deep: { m: 1 } } }, b: { uses: y } }
variants:
  base: { set: { a.with.n: 0, vars.k: 2 } }
  more: { extends: base, set: { b: null, a.with.deep.m: 7 }, add: { c: { uses: z } } }
  grid: { matrix: { a.with.n: [1e-4, 2], vars.k: [x, y] } }
  loop: { extends: loop }
";

    #[test]
    fn variants_build_on_each_other() {
        let tree = laid(TEXT, Some("more"), &[]).unwrap();
        assert_eq!(tree["stages"]["a"]["with"]["n"], 0);
        assert_eq!(tree["stages"]["a"]["with"]["deep"]["m"], 7);
        assert!(tree["stages"].get("b").is_none());
        assert_eq!(tree["stages"]["c"]["uses"], "z");
        assert_eq!(tree["vars"]["k"], 2);
    }

    #[test]
    fn cells_are_found_by_value_and_listed_by_name() {
        let root: Map<String, Value> = serde_yaml::from_str(TEXT).unwrap();
        let names = names(root["variants"].as_object().unwrap());
        assert_eq!(names.len(), 7);
        assert!(names.contains(&"grid[a.with.n=0.0001,vars.k=x]".to_owned()));
        let tree = laid(TEXT, Some("grid[a.with.n=1e-4,vars.k=y]"), &[]).unwrap();
        assert_eq!((&tree["stages"]["a"]["with"]["n"], &tree["vars"]["k"]), (&Value::from(1e-4), &Value::from("y")));
        assert!(laid(TEXT, Some("grid"), &[]).unwrap_err().contains("4 cells"));
        assert!(laid(TEXT, Some("grid[a.with.n=3,vars.k=y]"), &[]).is_err());
    }

    #[test]
    fn arguments_come_last_and_mistakes_are_told() {
        let tree = laid(TEXT, Some("base"), &[("a.with.n", "9"), ("vars.k", "null")]).unwrap();
        assert_eq!(tree["stages"]["a"]["with"]["n"], 9);
        assert!(tree["vars"]["k"].is_null());
        assert!(laid(TEXT, None, &[("vars.q", "1")]).unwrap_err().contains('q'));
        assert!(laid(TEXT, None, &[("aa.with", "1")]).unwrap_err().contains("aa"));
        assert!(laid(TEXT, None, &[("a.uses.x", "1")]).unwrap_err().contains("no map"));
        assert!(laid(TEXT, Some("loop"), &[]).unwrap_err().contains("extends itself"));
        assert!(laid(TEXT, Some("bas"), &[]).unwrap_err().contains("bas"));
    }
}
