//! From the text of a pipeline file to a resolved, checked pipeline.
//!
//! | file | step |
//! |---|---|
//! | `text` | file → tree of plain values; size, encoding, YAML, duplicate keys, `extends` |
//! | `variants` | lays a variant, a matrix cell and `--set` over the tree |
//! | `variables` | `${vars.x}` |
//! | `spec`, `repair` | tree → typed blocks, every mistake and not only the first |
//! | `resolve` | names → kinds, parameters with defaults, connected ports; cycles |
//! | `load` | the steps in their order, for one variant or for several |
//! | `files` | the files on disk that the pipeline names |
//! | `template` | `${inputs.x}` in the `run` of a `command` |
//! | `mistake`, `places`, `hint` | what is wrong, where it stands, what was meant |
//! | `schema` | the JSON Schema of the file |
//!
//! What the stages do, and what a cached result is worth, is decided elsewhere.

mod files;
pub(crate) mod hint;
mod load;
mod mistake;
mod places;
mod repair;
mod resolve;
mod schema;
mod spec;
mod template;
#[cfg(test)]
mod tests;
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
use serde_json::Value;

pub use load::{PipelineFile, load};
pub use mistake::{PipelineError, PipelineErrors, Place};
pub use schema::schema;
pub use spec::read_span;
pub use template::{SubstituteError, substitute};

use mistake::{Mark, Mistake};
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
        let mistakes = files::mistakes(&self.stages);
        if mistakes.is_empty() { Ok(()) } else { Err(self.sources.report(mistakes)) }
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
    /// `None` leaves it to the class of the failure.
    pub retries: Option<u32>,
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

/// Checks the files of several variants, as [`Pipeline::check_files`] does those of one.
///
/// # Errors
/// All that are wrong, each once.
pub fn check_files(pipelines: &[Pipeline]) -> Result<(), PipelineErrors> {
    let named = |p: &Pipeline| p.variant.clone().unwrap_or_else(|| variants::DEFAULT.to_owned());
    let wrong: Vec<_> = pipelines.iter().filter_map(|p| Some((named(p), p.check_files().err()?))).collect();
    if wrong.is_empty() { Ok(()) } else { Err(PipelineErrors::of_variants(wrong, pipelines.len())) }
}

/// The digest of a pipeline file's text, as [`Pipeline::texts`] gives it; `None` if it cannot be read.
pub fn text_digest(file: &Path) -> Option<Digest> {
    text::read_text(file).ok().map(|text| Digest::of(text.as_bytes()))
}

/// Refuses a name that could not be that of a folder, or that has a meaning of its own.
fn check_name(name: &str, what: &str, at: &[String], mark: Mark, mistakes: &mut Vec<Mistake>) {
    let fine = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let reserved = match (what, name) {
        ("stage", "vars") => Some("paths in `set` use it for variables; rename the stage"),
        ("variant", variants::DEFAULT) => Some("it is the pipeline as written; rename the variant"),
        _ => None,
    };
    if name.is_empty() || name.len() > 100 || name.starts_with('-') || !name.chars().all(fine) {
        mistakes.push(
            Mistake::new(at, mark, format!("`{name}` is not a {what} name"))
                .help("letters, digits, `-` and `_`, at most 100; it names a folder"),
        );
    } else if let Some(help) = reserved {
        mistakes.push(Mistake::new(at, mark, format!("`{name}` is reserved")).help(help));
    }
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
    fn report(&self, mistakes: Vec<Mistake>) -> PipelineErrors {
        match self.0.lock() {
            Ok(sources) => sources.report(mistakes),
            Err(poisoned) => poisoned.into_inner().report(mistakes),
        }
    }
}
