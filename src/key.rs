//! What enters an action key, and why.
//!
//! | ingredient | why |
//! |---|---|
//! | version | a change of this structure must not meet keys of the old one |
//! | kind, code digest | other code may compute something else |
//! | parameters, defaults filled in | they steer the computation |
//! | digest of each input's content, by port | not the upstream's key: an equal output stops the rerun there |
//! | digest of each declared code file | a `command`'s program is an input |
//! | pretrained models: the digest of a folder, or a repository and its commit | the weights are an input |
//! | declared environment variables | a `command` may read them |
//! | device class, of stages that compute in floating point | the last bits differ |
//! | declared output files, where the pipeline names them | a program can see the name it writes to |
//!
//! Not in it: stage names, order, resources, device numbers, shards, log level, paths. Hash and [`Manifest::diff`]
//! take the same walk, so an explanation cannot drift from the key.

use std::{collections::BTreeMap, fmt};

use grlm_cache::{ActionKey, Digest};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::pipeline::Stage;

/// Raised whenever the walk below changes.
pub const VERSION: u32 = 1;

/// The class of device that a floating-point result belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceClass {
    Cpu,
    Cuda,
}

/// Everything that can change an action's result. Kept whole in its record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub version: u32,
    pub kind: String,
    pub code: String,
    pub params: Value,
    /// Port → digest.
    pub inputs: BTreeMap<String, Digest>,
    /// Declared path → digest.
    pub code_files: BTreeMap<String, Digest>,
    /// Parameter that names a pretrained model → the digest of its folder, or `repository@commit`.
    #[serde(default)]
    pub models: BTreeMap<String, String>,
    /// Name → value, or `None` where it is not set.
    pub env: BTreeMap<String, Option<String>>,
    pub device: Option<DeviceClass>,
    /// Port → file name, for kinds whose outputs the pipeline declares.
    pub outputs: BTreeMap<String, String>,
}

/// Sees one ingredient after the other, in an order that never changes: its place, and its canonical form.
trait Visitor {
    fn visit(&mut self, place: Ingredient, canonical: &str);
}

/// Hashes each ingredient, with its place and its length in front.
struct Hash(blake3::Hasher);

impl Visitor for Hash {
    fn visit(&mut self, place: Ingredient, canonical: &str) {
        for text in [place.to_string().as_str(), canonical] {
            self.0.update(&(text.len() as u64).to_le_bytes());
            self.0.update(text.as_bytes());
        }
    }
}

/// Where an ingredient belongs; how a difference in it is told.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Ingredient {
    Version,
    Kind,
    Code,
    Param(String),
    Input(String),
    CodeFile(String),
    Model(String),
    Env(String),
    Device,
    Output(String),
}

impl fmt::Display for Ingredient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version => f.write_str("key version"),
            Self::Kind => f.write_str("kind"),
            Self::Code => f.write_str("stage code"),
            Self::Param(path) if path.is_empty() => f.write_str("`with`"),
            Self::Param(path) => write!(f, "`with.{path}`"),
            Self::Input(port) => write!(f, "input `{port}`"),
            Self::CodeFile(path) => write!(f, "code `{path}`"),
            Self::Model(place) => write!(f, "model of `with.{place}`"),
            Self::Env(name) => write!(f, "environment variable `{name}`"),
            Self::Device => f.write_str("device class"),
            Self::Output(port) => write!(f, "name of output `{port}`"),
        }
    }
}

/// One thing that differs between two manifests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    place: Ingredient,
    earlier: Option<String>,
    now: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = &self.place;
        match (place, &self.earlier, &self.now) {
            (_, None, _) => write!(f, "{place} is new"),
            (_, _, None) => write!(f, "{place} is gone"),
            (Ingredient::Code | Ingredient::Input(_) | Ingredient::CodeFile(_), ..) => write!(f, "{place} changed"),
            (_, Some(earlier), Some(now)) if earlier.len().max(now.len()) <= 60 => {
                write!(f, "{place} {earlier} → {now}")
            }
            _ => write!(f, "{place} changed"),
        }
    }
}

impl Manifest {
    /// Pins a stage: digests of its inputs by port and of its code by declared path, its models by the parameter that
    /// names each, and its variables.
    pub fn new(
        stage: &Stage,
        inputs: BTreeMap<String, Digest>,
        code_files: BTreeMap<String, Digest>,
        models: BTreeMap<String, String>,
        env: BTreeMap<String, Option<String>>,
        device: Option<DeviceClass>,
    ) -> Self {
        let kind = stage.kind.name();
        let outputs = if stage.declares_outputs() {
            stage.outputs.iter().map(|o| (o.name.to_string(), o.file.to_string())).collect()
        } else {
            BTreeMap::new()
        };
        Self {
            version: VERSION,
            kind: kind.to_owned(),
            code: grlm_stages::code_digest(kind).unwrap_or_default().to_owned(),
            params: stage.params.clone(),
            inputs,
            code_files,
            models,
            env,
            device,
            outputs,
        }
    }

    /// The BLAKE3 hash of all ingredients, each with its place and its length in front.
    pub fn key(&self) -> ActionKey {
        let mut hash = Hash(blake3::Hasher::new());
        self.walk(&mut hash);
        ActionKey(Digest::from(hash.0.finalize()))
    }

    /// The digest of a `command`'s text, declared code and declared variables: what its rows' keys are made of, beside
    /// each row's content. `None` for other kinds.
    pub fn program(&self) -> Option<Digest> {
        let run = self.params.get("run").and_then(Value::as_str).filter(|_| self.kind == "command")?;
        let mut hash = Hash(blake3::Hasher::new());
        hash.visit(Ingredient::Param("run".into()), run);
        self.walk_program(&mut hash);
        Some(Digest::from(hash.0.finalize()))
    }

    /// What differs from an earlier manifest, in the order of the walk.
    pub fn diff(&self, earlier: &Self) -> Vec<Difference> {
        let (mine, theirs) = (self.ingredients(), earlier.ingredients());
        let places: std::collections::BTreeSet<&Ingredient> = mine.keys().chain(theirs.keys()).collect();
        places
            .into_iter()
            .filter(|place| mine.get(place) != theirs.get(place))
            .map(|place| Difference {
                place: place.clone(),
                earlier: theirs.get(place).cloned(),
                now: mine.get(place).cloned(),
            })
            .collect()
    }

    fn ingredients(&self) -> BTreeMap<Ingredient, String> {
        struct Collect(BTreeMap<Ingredient, String>);
        impl Visitor for Collect {
            fn visit(&mut self, place: Ingredient, canonical: &str) {
                self.0.insert(place, canonical.to_owned());
            }
        }
        let mut collect = Collect(BTreeMap::new());
        self.walk(&mut collect);
        collect.0
    }

    fn walk(&self, visitor: &mut dyn Visitor) {
        visitor.visit(Ingredient::Version, &self.version.to_string());
        visitor.visit(Ingredient::Kind, &self.kind);
        visitor.visit(Ingredient::Code, &self.code);
        walk_value(&mut String::new(), &self.params, visitor);
        for (port, digest) in &self.inputs {
            visitor.visit(Ingredient::Input(port.clone()), &digest.hex());
        }
        self.walk_program(visitor);
        if let Some(device) = self.device {
            visitor.visit(Ingredient::Device, if device == DeviceClass::Cpu { "cpu" } else { "cuda" });
        }
        for (port, file) in &self.outputs {
            visitor.visit(Ingredient::Output(port.clone()), file);
        }
    }

    fn walk_program(&self, visitor: &mut dyn Visitor) {
        for (path, digest) in &self.code_files {
            visitor.visit(Ingredient::CodeFile(path.clone()), &digest.hex());
        }
        for (place, identity) in &self.models {
            visitor.visit(Ingredient::Model(place.clone()), identity);
        }
        for (name, value) in &self.env {
            // Quoted, so that no value looks like an unset variable.
            let canonical = value.as_ref().map_or_else(|| "unset".into(), |v| format!("{v:?}"));
            visitor.visit(Ingredient::Env(name.clone()), &canonical);
        }
    }
}

/// Visits the leaves of a parameter tree, keys sorted; JSON keeps types apart (`1`, `1.0`, `"1"`, `true`, `null`).
fn walk_value(path: &mut String, value: &Value, visitor: &mut dyn Visitor) {
    let length = path.len();
    let step = |path: &mut String, name: &str, value: &Value, visitor: &mut dyn Visitor| {
        if !path.is_empty() {
            path.push('.');
        }
        // A dot in a name must not look like a step.
        path.push_str(&name.replace('\\', "\\\\").replace('.', "\\."));
        walk_value(path, value, visitor);
        path.truncate(length);
    };
    match value {
        Value::Object(map) if !map.is_empty() => {
            let mut names: Vec<&String> = map.keys().collect();
            names.sort_unstable();
            for name in names {
                step(path, name, &map[name], visitor);
            }
        }
        Value::Array(list) if !list.is_empty() => {
            visitor.visit(Ingredient::Param(format!("{path}#")), &list.len().to_string());
            for (i, item) in list.iter().enumerate() {
                step(path, &format!("[{i}]"), item, visitor);
            }
        }
        leaf => visitor.visit(Ingredient::Param(path.clone()), &leaf.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn manifest(params: Value) -> Manifest {
        Manifest {
            version: VERSION,
            kind: "similarity".into(),
            code: "c0de".into(),
            params,
            inputs: BTreeMap::from([("items".into(), Digest::of(b"items"))]),
            code_files: BTreeMap::new(),
            models: BTreeMap::new(),
            env: BTreeMap::new(),
            device: Some(DeviceClass::Cpu),
            outputs: BTreeMap::new(),
        }
    }

    #[test]
    fn order_and_spelling_change_nothing_and_types_do() {
        let key = |text: &str| manifest(serde_json::from_str(text).unwrap()).key();
        assert_eq!(key(r#"{"a": 1, "b": 1e-4}"#), key(r#"{"b": 0.0001, "a": 1}"#));
        assert_ne!(key(r#"{"a": 1}"#), key(r#"{"a": "1"}"#));
        assert_ne!(key(r#"{"a": [1, 2]}"#), key(r#"{"a": [1, [2]]}"#));
        assert_ne!(key(r#"{"a": {"b": 1}}"#), key(r#"{"a.b": 1}"#));
        assert_ne!(key(r#"{"a": []}"#), key(r#"{"a": {}}"#));
    }

    #[test]
    fn every_ingredient_changes_the_key_and_is_told() {
        let base = manifest(json!({"top_k": 20}));
        let told = |change: &dyn Fn(&mut Manifest)| {
            let mut other = base.clone();
            change(&mut other);
            assert_ne!(other.key(), base.key());
            other.diff(&base).iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
        };
        assert_eq!(told(&|m| m.params = json!({"top_k": 40})), "`with.top_k` 20 → 40");
        assert_eq!(told(&|m| m.params = json!({"top_k": 20, "x": 1})), "`with.x` is new");
        assert_eq!(told(&|m| m.code = "other".into()), "stage code changed");
        assert_eq!(told(&|m| m.kind = "tid".into()), "kind similarity → tid");
        assert_eq!(told(&|m| m.version = 2), "key version 1 → 2");
        assert_eq!(told(&|m| m.device = Some(DeviceClass::Cuda)), "device class cpu → cuda");
        assert_eq!(
            told(&|m| {
                m.inputs.insert("items".into(), Digest::of(b"x"));
            }),
            "input `items` changed"
        );
        assert_eq!(
            told(&|m| {
                m.code_files.insert("a.py".into(), Digest::of(b"x"));
            }),
            "code `a.py` is new"
        );
        assert_eq!(
            told(&|m| {
                m.models.insert("encoder.model".into(), "org/name@0123".into());
            }),
            "model of `with.encoder.model` is new"
        );
        assert_eq!(
            told(&|m| {
                m.env.insert("SEED".into(), None);
            }),
            "environment variable `SEED` is new"
        );
        assert_eq!(
            told(&|m| {
                m.outputs.insert("out".into(), "x".into());
            }),
            "name of output `out` is new"
        );
        assert!(base.diff(&base).is_empty());
    }

    #[test]
    fn an_unset_variable_is_not_an_empty_or_a_speaking_one() {
        let with = |value: Option<&str>| {
            let mut m = manifest(json!({}));
            m.env.insert("X".into(), value.map(str::to_owned));
            m.key()
        };
        assert_ne!(with(None), with(Some("")));
        assert_ne!(with(None), with(Some("unset")));
    }
}
