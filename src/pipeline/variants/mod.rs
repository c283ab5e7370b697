//! Variants: checks their definitions, finds the one that is asked for, and lays it, a cell of its matrix and `--set`
//! over the tree of a pipeline file.
//!
//! A path in `set` starts at a stage's name or at `vars`; a new value replaces what is there, `null` removes it. A
//! variant that extends another is laid over it. Cells are named by their values, `lr[train.with.lr=0.0001]`.

mod matrix;
mod overlay;

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value};

use super::{
    Selection, check_name, hint,
    mistake::{KeyPath, Mark, Mistake, PipelineErrors, below, path},
    places::{Origin, Sources},
    repair::typed,
    spec::VariantSpec,
    text::argument,
};
use matrix::{Cell, Matrix};
use overlay::{put, stages};

/// What a sweep calls the pipeline as it is written.
pub(crate) const DEFAULT: &str = "default";

/// Names in a list of cells.
const LISTED: usize = 50;

/// The variants of a file, in its order.
#[derive(Debug, Default)]
pub(crate) struct Variants {
    all: Vec<Variant>,
    by_name: HashMap<String, usize>,
}

#[derive(Debug)]
struct Variant {
    name: String,
    spec: VariantSpec,
    matrix: Matrix,
}

impl Variant {
    fn at(&self, parts: &[&str]) -> KeyPath {
        [path(&["variants", &self.name]), path(parts)].concat()
    }

    /// Its name, or that of each of its cells.
    fn names(&self) -> Vec<String> {
        match self.matrix.count() {
            0 => vec![self.name.clone()],
            _ => self.matrix.names().map(|cell| format!("{}[{cell}]", self.name)).collect(),
        }
    }
}

impl Variants {
    /// Reads a `variants:` block, whether or not any of them is asked for.
    pub fn read(written: &Map<String, Value>, mistakes: &mut Vec<Mistake>) -> Self {
        let mut variants = Self::default();
        for (name, block) in written {
            let at = path(&["variants", name]);
            check_name(name, "variant", &at, Mark::Key, mistakes);
            let spec = typed::<VariantSpec>(block, &at, &HashSet::new(), mistakes).unwrap_or_default();
            let matrix = Matrix::read(&spec.matrix, &below(&at, &["matrix"]), mistakes);
            variants.by_name.insert(name.clone(), variants.all.len());
            variants.all.push(Variant { name: name.clone(), spec, matrix });
        }
        variants.check_bases(mistakes);
        variants
    }

    /// Every variant that another one extends exists, and none extends itself.
    fn check_bases(&self, mistakes: &mut Vec<Mistake>) {
        // From which start a variant was reached first: each is passed once.
        let mut reached: Vec<Option<usize>> = vec![None; self.all.len()];
        for start in 0..self.all.len() {
            let mut here = start;
            while reached[here].is_none() {
                reached[here] = Some(start);
                let variant = &self.all[here];
                let Some(base) = &variant.spec.extends else { break };
                let at = variant.at(&["extends"]);
                match self.by_name.get(base) {
                    Some(&next) if reached[next] == Some(start) => {
                        let circle = format!("variant `{base}` extends itself{}", self.through(next, here));
                        mistakes.push(Mistake::value(&at, circle).help("one of them must extend no other"));
                        break;
                    }
                    Some(&next) => here = next,
                    None => {
                        let help = hint::help(base, self.all.iter().map(|v| v.name.as_str()));
                        let message = format!("there is no variant `{base}` to extend");
                        mistakes.push(Mistake::value(&at, message).maybe_help(help));
                        break;
                    }
                }
            }
        }
    }

    /// The variants between the ends of a circle.
    fn through(&self, first: usize, last: usize) -> String {
        let names: Vec<&str> = self.bases(first).take(LISTED).map(|v| v.name.as_str()).collect();
        if first == last { String::new() } else { format!(": {} → {}", names.join(" → "), names[0]) }
    }

    /// A variant and those that it builds on, each once even in a circle.
    fn bases(&self, first: usize) -> impl Iterator<Item = &Variant> {
        let mut passed = HashSet::new();
        let base = |&id: &usize| self.by_name.get(self.all[id].spec.extends.as_ref()?).copied();
        std::iter::successors(Some(first), base).take_while(move |id| passed.insert(*id)).map(|id| &self.all[id])
    }

    /// The names of all variants, with what the file says about them; a matrix gives one for each of its cells.
    pub fn list(&self) -> impl Iterator<Item = (String, Option<&str>)> {
        self.all.iter().flat_map(|v| v.names().into_iter().map(|name| (name, v.spec.description.as_deref())))
    }

    /// What the names on the command line of a sweep stand for: a matrix for all of its cells, `default` (`None`) for
    /// the pipeline as written; no names for everything.
    pub fn choose(&self, names: &[String]) -> Vec<Option<String>> {
        if names.is_empty() {
            return std::iter::once(None).chain(self.list().map(|(name, _)| Some(name))).collect();
        }
        let expand = |name: &String| match self.by_name.get(name) {
            None if name == DEFAULT => vec![None],
            None => vec![Some(name.clone())],
            Some(&id) => self.all[id].names().into_iter().map(Some).collect(),
        };
        names.iter().flat_map(expand).collect()
    }

    /// The variant of this name, and the values of the cell if one was named.
    fn find(&self, wanted: &str) -> Result<(usize, Cell), PipelineErrors> {
        let (name, inside) = match wanted.strip_suffix(']').and_then(|w| w.split_once('[')) {
            Some((name, inside)) => (name, Some(inside)),
            None => (wanted, None),
        };
        let Some(&id) = self.by_name.get(name) else {
            let help = hint::help(name, self.all.iter().map(|v| v.name.as_str()));
            return Err(PipelineErrors::one(format!("the pipeline has no variant `{name}`"), help));
        };
        let variant = &self.all[id];
        match (inside, variant.matrix.count()) {
            (None, 0) => Ok((id, Cell::new())),
            (Some(_), 0) => Err(PipelineErrors::one(format!("variant `{name}` has no matrix"), None)),
            (Some(inside), _) => match variant.matrix.find(inside) {
                Some(cell) => Ok((id, cell)),
                None => Err(variant.choose_one(format!("variant `{name}` has no cell `{wanted}`"))),
            },
            (None, count) => Err(variant.choose_one(format!("variant `{name}` is a matrix of {count} cells"))),
        }
    }
}

impl Variant {
    fn choose_one(&self, message: String) -> PipelineErrors {
        let cells: Vec<String> =
            self.matrix.names().take(LISTED).map(|cell| format!("{}[{cell}]", self.name)).collect();
        PipelineErrors::one(message, Some(format!("choose one:\n{}", cells.join("\n"))))
    }

    fn lay_over(&self, root: &mut Map<String, Value>, sources: &mut Sources, mistakes: &mut Vec<Mistake>) {
        for (stage, added) in &self.spec.add {
            let at = self.at(&["add", stage]);
            if stages(root).contains_key(stage) {
                let message = format!("variant `{}` adds stage `{stage}`, which is there already", self.name);
                mistakes.push(Mistake::key(&at, message));
                continue;
            }
            stages(root).insert(stage.clone(), added.clone());
            sources.overlays.push((path(&["stages", stage]), Origin::File(at)));
        }
        for (target, value) in &self.spec.set {
            let at = self.at(&["set", target]);
            put(root, target, value.clone(), Origin::File(at.clone()), sources)
                .unwrap_or_else(|(message, help)| mistakes.push(Mistake::key(&at, message).maybe_help(help)));
        }
    }
}

/// Lays over `root` what `selection` asks for.
///
/// # Errors
/// The variant does not exist, or is a matrix that was asked for as a whole.
pub(crate) fn apply(
    root: &mut Map<String, Value>,
    variants: &Variants,
    selection: &Selection,
    sources: &mut Sources,
    mistakes: &mut Vec<Mistake>,
) -> Result<(), PipelineErrors> {
    if let Some(wanted) = &selection.variant {
        let (id, cell) = variants.find(wanted)?;
        let chain: Vec<&Variant> = variants.bases(id).collect();
        for variant in chain.into_iter().rev() {
            variant.lay_over(root, sources, mistakes);
        }
        for (target, value) in cell {
            let at = variants.all[id].at(&["matrix", &target]);
            put(root, &target, value, Origin::File(at.clone()), sources)
                .unwrap_or_else(|(message, help)| mistakes.push(Mistake::key(&at, message).maybe_help(help)));
        }
    }
    for (i, (target, text)) in selection.set.iter().enumerate() {
        let origin = Origin::Argument(format!("{target}={text}"));
        let set = argument(text)
            .map_err(|message| (message, Some("text may need quotes for YAML, beside those for the shell".to_owned())))
            .and_then(|value| put(root, target, value, origin.clone(), sources));
        if let Err((message, help)) = set {
            // A place of its own, since it may have none in the file.
            let at = path(&["--set", &i.to_string()]);
            sources.overlays.push((at.clone(), origin));
            mistakes.push(Mistake::value(&at, message).maybe_help(help));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Map<String, Value>, Variants, Vec<Mistake>) {
        let root: Map<String, Value> = serde_yaml::from_str(text).unwrap();
        let mut mistakes = Vec::new();
        let variants = Variants::read(root["variants"].as_object().unwrap(), &mut mistakes);
        (root, variants, mistakes)
    }

    fn laid(text: &str, variant: Option<&str>, set: &[(&str, &str)]) -> Result<Value, String> {
        let (mut root, variants, mut mistakes) = read(text);
        let selection = Selection {
            variant: variant.map(str::to_owned),
            set: set.iter().map(|(p, v)| ((*p).to_owned(), (*v).to_owned())).collect(),
        };
        apply(&mut root, &variants, &selection, &mut Sources::default(), &mut mistakes).map_err(|e| format!("{e}"))?;
        let told: Vec<String> = mistakes.into_iter().map(|m| m.message).collect();
        if told.is_empty() { Ok(Value::Object(root)) } else { Err(told.join("\n")) }
    }

    /// What is wrong with a `variants:` block: places, messages and help.
    fn wrong(variants: &str) -> Vec<String> {
        let (_, _, mistakes) = read(&format!("variants: {variants}"));
        let line = |m: &Mistake| format!("{}: {} ({})", m.path.join("."), m.message, m.help.as_deref().unwrap_or("-"));
        mistakes.iter().map(line).collect()
    }

    const TEXT: &str = "
vars: { k: 1 }
stages: { a: { uses: x, with: { n: 5, deep: { m: 1 } } }, b: { uses: y } }
variants:
  base: { set: { a.with.n: 0, vars.k: 2 } }
  more: { extends: base, set: { b: null, a.with.deep.m: 7 }, add: { c: { uses: z } } }
  grid: { description: Two by two., matrix: { a.with.n: [1e-4, 2], vars.k: [x, y] } }
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
        let (_, variants, _) = read(TEXT);
        let list: Vec<_> = variants.list().collect();
        assert_eq!(list.len(), 6);
        assert_eq!((list[2].0.as_str(), list[2].1), ("grid[a.with.n=0.0001,vars.k=x]", Some("Two by two.")));
        let tree = laid(TEXT, Some("grid[a.with.n=1e-4,vars.k=y]"), &[]).unwrap();
        assert_eq!((&tree["stages"]["a"]["with"]["n"], &tree["vars"]["k"]), (&Value::from(1e-4), &Value::from("y")));
        assert!(laid(TEXT, Some("grid"), &[]).unwrap_err().contains("4 cells"));
        assert!(laid(TEXT, Some("grid[a.with.n=3,vars.k=y]"), &[]).is_err());
    }

    #[test]
    fn a_sweep_takes_matrices_cell_by_cell() {
        let (_, variants, _) = read(TEXT);
        assert_eq!(variants.choose(&[]).len(), 7);
        let chosen = variants.choose(&["default".into(), "grid".into(), "base".into(), "nope".into()]);
        assert_eq!((chosen.len(), &chosen[0], chosen[5].as_deref()), (7, &None, Some("base")));
    }

    #[test]
    fn arguments_come_last_and_all_their_mistakes_are_told() {
        let tree = laid(TEXT, Some("base"), &[("a.with.n", "9"), ("vars.k", "null")]).unwrap();
        assert_eq!(tree["stages"]["a"]["with"]["n"], 9);
        assert!(tree["vars"]["k"].is_null());
        let told = laid(
            TEXT,
            None,
            &[("vars.q", "1"), ("aa.with", "1"), ("a.uses.x", "1"), ("a.uses", "["), ("vars.k", ".nan")],
        );
        assert_eq!(told.as_ref().unwrap_err().lines().count(), 5, "{told:?}");
        for words in ["no variable `q`", "no stage `aa`", "no map", "not a YAML value", "not a finite number"] {
            assert!(told.as_ref().unwrap_err().contains(words), "{told:?}");
        }
        assert!(laid(TEXT, Some("bas"), &[]).unwrap_err().contains("bas"));
    }

    #[test]
    fn wrong_definitions_are_placed_and_answered_with_the_nearest_name() {
        insta::assert_snapshot!(
            wrong("{ v: { sets: {} }, n: null, w: { extends: vv }, one: { extends: two }, two: { extends: one } }")
                .join("\n"),
            @r"
        variants.v.sets: unknown key `sets` (did you mean `set`?)
        variants.n: expected a map of keys, found nothing (-)
        variants.w.extends: there is no variant `vv` to extend (did you mean `v`?)
        variants.two.extends: variant `one` extends itself: one → two → one (one of them must extend no other)
        "
        );
        assert!(wrong("{ loop: { extends: loop } }")[0].starts_with("variants.loop.extends: variant `loop` extends"));
    }

    #[test]
    fn names_are_those_of_folders_and_default_is_taken() {
        for name in ["x[1]", "../q", "", "a b"] {
            assert!(wrong(&format!("{{ '{name}': {{}} }}"))[0].contains("is not a variant name"), "{name}");
        }
        assert!(wrong("{ default: {} }")[0].contains("`default` is reserved"));
        assert!(wrong("{ no-neighbors_2: {} }").is_empty());
    }
}
