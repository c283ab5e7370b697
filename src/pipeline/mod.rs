//! From the text of a pipeline file to a resolved, checked pipeline.
//!
//! | file | step |
//! |---|---|
//! | `text` | file → tree of plain values; size, encoding, YAML, duplicate keys, `extends` |
//! | `variants` | lays a variant, a matrix cell and `--set` over the tree |
//! | `variables` | `${vars.x}` |
//! | `spec`, `repair` | tree → typed blocks, every mistake and not only the first |
//! | `resolve` | names → kinds, parameters with defaults, connected ports; cycles |
//! | `files` | the files on disk that the pipeline names |
//! | `template` | `${inputs.x}` in the `run` of a `command` |
//! | `mistake`, `places`, `hint` | what is wrong, where it stands, what was meant |
//! | `schema` | the JSON Schema of the file |
//!
//! What the stages do, and what a cached result is worth, is decided elsewhere.

mod files;
pub(crate) mod hint;
mod mistake;
mod places;
mod repair;
mod resolve;
mod schema;
mod spec;
mod template;
mod text;
mod variables;
mod variants;

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use grlm_cache::Digest;
use grlm_stages::{Output, Resources, StageKind};
use serde_json::{Map, Value};

pub use mistake::{PipelineError, PipelineErrors, Place};
pub use schema::schema;
pub use spec::read_span;
pub use template::{SubstituteError, substitute};

use places::Sources;

/// A stage's name: letters, digits, `-` and `_`; a component of paths under `out/`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StageName(String);

impl StageName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for StageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A pipeline with every name resolved and every default filled in.
#[derive(Debug)]
pub struct Pipeline {
    pub name: String,
    /// The variant or matrix cell, as in `lr[train.with.lr=1e-4]`; `None` is the pipeline as written.
    pub variant: Option<String>,
    pub file: PathBuf,
    /// In the order of the file.
    pub stages: Vec<Stage>,
    sources: SharedSources,
}

impl Pipeline {
    /// The folder under `out/` that shows this pipeline's results: `name` or `name@variant`, as one path component.
    pub fn out_name(&self) -> String {
        let Some(variant) = &self.variant else { return self.name.clone() };
        let mut out = format!("{}@", self.name);
        for c in variant.chars() {
            match c {
                '/' | '\\' | '%' | '\0'..='\x1f' => out.push_str(&format!("%{:02X}", c as u32)),
                c => out.push(c),
            }
        }
        // File systems stop at 255 bytes; long cells keep their start and stay distinct.
        if out.len() > 200 {
            let digest = blake3::hash(out.as_bytes()).to_hex();
            let mut end = 180;
            while !out.is_char_boundary(end) {
                end -= 1;
            }
            out.truncate(end);
            out.push('~');
            out.push_str(&digest[..12]);
        }
        out
    }

    /// The texts that the pipeline was read from, by digest: its own file, then those it extends.
    pub fn texts(&self) -> Vec<(PathBuf, Digest)> {
        let sources = self.sources.0.lock().unwrap_or_else(PoisonError::into_inner);
        sources.files.iter().map(|file| (file.path.clone(), Digest::of(file.text.as_bytes()))).collect()
    }

    /// The index of the stage of this name.
    pub fn stage(&self, name: &str) -> Option<usize> {
        self.stages.iter().position(|s| s.name.as_str() == name)
    }

    /// The stage that a user named.
    ///
    /// # Errors
    /// There is none, with the nearest name.
    pub fn named(&self, name: &str) -> Result<usize, PipelineErrors> {
        self.stage(name).ok_or_else(|| {
            let names = self.stages.iter().map(|s| s.name.as_str());
            PipelineErrors::one(format!("the pipeline has no stage `{name}`"), hint::help(name, names))
        })
    }

    /// Checks the files on disk that the pipeline names: inputs and code exist, and are files or folders as the
    /// ports want. Apart from loading, so that planning can go on without them.
    ///
    /// # Errors
    /// All that are wrong.
    pub fn check_files(&self) -> Result<(), PipelineErrors> {
        files::check(self)
    }
}

/// One stage, resolved.
pub struct Stage {
    pub name: StageName,
    pub kind: &'static dyn StageKind,
    /// What the pipeline's author says about it.
    pub description: Option<String>,
    /// Every default filled in, as [`StageKind::resolve_params`] returns them.
    pub params: Value,
    pub inputs: BTreeMap<String, InputSource>,
    pub outputs: Vec<Output>,
    /// What one attempt needs: the kind's own needs, where the pipeline does not say otherwise.
    pub resources: Resources,
    pub timeout: Option<Duration>,
    pub retries: u32,
    /// Environment variables that are passed on and enter the key.
    pub env: Vec<String>,
    /// Environment variables that are passed on and do not.
    pub pass_env: Vec<String>,
    /// As `pass_env`, blanked in logs.
    pub secrets: Vec<String>,
    /// Code that a `command` runs, as declared.
    pub code: Vec<PathBuf>,
}

impl Stage {
    /// Whether the pipeline itself names the outputs' files (`command`), so that they are part of what the stage is.
    pub fn declares_outputs(&self) -> bool {
        self.kind.name() == resolve::COMMAND
    }
}

impl fmt::Debug for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stage")
            .field("name", &self.name)
            .field("kind", &self.kind.name())
            .field("params", &self.params)
            .field("inputs", &self.inputs)
            .finish_non_exhaustive()
    }
}

/// Where an input's content comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum InputSource {
    /// A file or folder, relative to the working directory unless absolute.
    File(PathBuf),
    /// `stages[stage].outputs[output]`.
    Stage { stage: usize, output: usize },
}

/// What to load of a pipeline file.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// A variant or a matrix cell.
    pub variant: Option<String>,
    /// `--set path=value`, in order; values are YAML.
    pub set: Vec<(String, String)>,
}

/// Loads a pipeline file: reads, resolves and checks it. Does not look at the files it names.
///
/// # Errors
/// Everything that is wrong, with places.
pub fn load(file: &Path, selection: &Selection) -> Result<Pipeline, PipelineErrors> {
    let text::Tree { mut root, mut sources, mut mistakes } = text::read(file)?;
    variants::apply(&mut root, selection, &mut sources, &mut mistakes)?;
    let poisoned = {
        let vars = match root.get("vars") {
            Some(Value::Object(vars)) => vars.clone(),
            _ => Map::new(),
        };
        let mut variables = variables::Variables::new(&vars);
        variables.check_all();
        if let Some(Value::Object(stages)) = root.get_mut("stages") {
            for (name, stage) in stages.iter_mut() {
                variables.expand_stage(name, stage);
            }
        }
        mistakes.append(&mut variables.mistakes);
        variables.poisoned
    };
    let resolved = resolve::resolve(root, &poisoned, &mut mistakes);
    match resolved {
        Some((name, stages)) if mistakes.is_empty() => Ok(Pipeline {
            name: name.unwrap_or_else(|| text::stem(file)),
            variant: selection.variant.clone(),
            file: file.to_owned(),
            stages,
            sources: SharedSources(Arc::new(Mutex::new(sources))),
        }),
        _ => Err(sources.report(mistakes)),
    }
}

/// The digest of a pipeline file's text, as [`Pipeline::texts`] gives it; `None` if it cannot be read.
pub fn text_digest(file: &Path) -> Option<Digest> {
    text::read_text(file).ok().map(|text| Digest::of(text.as_bytes()))
}

/// The names of a file's variants, in its order; a matrix gives one for each of its cells.
///
/// # Errors
/// The file cannot be read, or is not YAML.
pub fn variants(file: &Path) -> Result<Vec<String>, PipelineErrors> {
    let tree = text::read(file)?;
    Ok(tree.root.get("variants").and_then(Value::as_object).map(variants::names).unwrap_or_default())
}

/// Kept for mistakes that are found later.
#[derive(Clone)]
struct SharedSources(Arc<Mutex<Sources>>);

impl fmt::Debug for SharedSources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sources")
    }
}

impl SharedSources {
    fn report(&self, mistakes: Vec<mistake::Mistake>) -> PipelineErrors {
        match self.0.lock() {
            Ok(sources) => sources.report(mistakes),
            Err(poisoned) => poisoned.into_inner().report(mistakes),
        }
    }
}
