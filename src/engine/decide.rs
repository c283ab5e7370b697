//! Whether a stage has to run, and why: its action from what is known of its inputs, and the store's answer.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use grlm_cache::{ActionKey, ActionSummary, Content, Store, StoreError};
use grlm_stages::{context::Identity, hub::PinnedModel};
use rayon::prelude::*;

use super::{
    content::Odd,
    models::Models,
    work::{Node, Permission, Source, Work},
};
use crate::{
    engine::history::History,
    key::{DeviceClass, Manifest},
    pipeline::Stage,
};

/// Contents of users' files and folders, and the models that stages name, taken once at the start of a run.
#[derive(Debug, Default)]
pub struct Files {
    contents: HashMap<PathBuf, Content>,
    models: Models,
}

impl Files {
    /// Digests every file that a node that may run (or be used) names, code of commands included.
    ///
    /// # Errors
    /// The first file that cannot be read, a model that the hub does not have, or the store.
    pub fn digest(store: &Store, work: &Work) -> Result<Self, FilesError> {
        let mut paths: Vec<&Path> = Vec::new();
        for (id, node) in work.nodes.iter().enumerate() {
            if node.permission == Permission::Leave {
                continue;
            }
            paths.extend(work.stage(id).code.iter().map(PathBuf::as_path));
            paths.extend(node.sources.values().filter_map(|s| match s {
                Source::File(path) => Some(path.as_path()),
                Source::Output { .. } => None,
            }));
        }
        paths.sort_unstable();
        paths.dedup();
        let one = |path: &&Path| match store.digest(path) {
            Ok(content) => Ok((path.to_path_buf(), content)),
            Err(error) => Err(FilesError::of(path, error, work)),
        };
        // A large file is hashed by all cores itself; many small ones are spread over them.
        let digested = if paths.len() < 64 {
            paths.iter().map(one).collect::<Result<_, FilesError>>()?
        } else {
            paths.par_iter().map(one).collect::<Result<_, FilesError>>()?
        };
        Ok(Self { contents: digested, models: Models::pin(store, work)? })
    }

    /// Whether every model that is asked for is there, as far as is known.
    ///
    /// # Errors
    /// A model is not there, so that its stage could not run.
    pub fn check_models(&self, work: &Work) -> Result<(), FilesError> {
        self.models.check(work)
    }

    pub fn get(&self, path: &Path) -> Option<&Content> {
        self.contents.get(path)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&PathBuf, &Content)> {
        self.contents.iter()
    }
}

/// Files and models of the user's that cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    #[error("{name} ({}): {what}", path.display())]
    Odd { name: String, path: PathBuf, what: String, help: Option<String> },
    #[error("the model of `{stage}` (`{parameter}`): {message}")]
    Model { stage: String, parameter: String, message: String, help: Option<String> },
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl FilesError {
    /// Names what the pipeline calls the file, if the error is the file's and not the store's.
    fn of(path: &Path, error: StoreError, work: &Work) -> Self {
        let Some(Odd { path: place, what, help }) = Odd::below(path, &error) else { return error.into() };
        let what = if place == path { format!("it {what}") } else { format!("`{}` {what}", place.display()) };
        Self::Odd { name: name_of(path, work), path: path.to_owned(), what, help }
    }
}

/// ``input `stage.port` ``, or whose code it is.
fn name_of(path: &Path, work: &Work) -> String {
    // A stage that nobody asked for may read it too.
    let asked_for = || work.nodes.iter().filter(|node| node.permission != Permission::Leave);
    let input = asked_for().find_map(|node| {
        let (port, _) = node.sources.iter().find(|(_, source)| matches!(source, Source::File(file) if file == path))?;
        Some(format!("input `{}.{port}`", node.label))
    });
    let code = || {
        let declares = |node: &&Node| work.stage_of(node).code.iter().any(|code| code == path);
        Some(format!("code of `{}`", asked_for().find(declares)?.label))
    };
    input.or_else(code).unwrap_or_else(|| "a file of the pipeline".to_owned())
}

/// A stage with all its inputs known.
#[derive(Debug, Clone)]
pub struct Action {
    pub key: ActionKey,
    pub manifest: Manifest,
    /// Port → content.
    pub inputs: BTreeMap<String, Content>,
    /// Pretrained models by the parameter that names each.
    pub models: BTreeMap<String, PinnedModel>,
}

impl Action {
    /// Pins `stage` to `inputs`. Environment variables are read now.
    pub fn new(stage: &Stage, inputs: BTreeMap<String, Content>, files: &Files) -> Self {
        let digests = inputs.iter().map(|(port, content)| (port.clone(), content.digest)).collect();
        let code =
            stage.code.iter().filter_map(|path| Some((path.display().to_string(), files.get(path)?.digest))).collect();
        let env = stage.env.iter().map(|name| (name.clone(), std::env::var(name).ok())).collect();
        let pinned = files.models.of(stage);
        let identities = pinned.iter().map(|(place, model)| (place.clone(), model.identity.clone())).collect();
        let manifest = Manifest::new(stage, digests, code, identities, env, device_class(stage));
        let models = pinned.into_iter().map(|(place, model)| (place, model.model)).collect();
        Self { key: manifest.key(), manifest, inputs, models }
    }

    /// What the keys of the stage's rows may be made of.
    pub fn identity(&self) -> Identity {
        let inputs = self.inputs.iter().map(|(port, content)| (port.clone(), content.digest.hex())).collect();
        let program = self.manifest.program().map(|digest| digest.hex());
        Identity { inputs, models: self.manifest.models.clone(), program }
    }
}

/// Results of stages that compute in floating point belong to the class of device that they ask for.
pub fn device_class(stage: &Stage) -> Option<DeviceClass> {
    stage.kind.floating_point().then_some(if stage.resources.gpus > 0 { DeviceClass::Cuda } else { DeviceClass::Cpu })
}

/// The store's answer about an action.
#[derive(Debug, Clone)]
pub enum Answer {
    /// Its result is there and whole.
    Ready(ActionSummary),
    /// It never ran.
    Unknown,
    /// It ran, but this output is gone or damaged.
    Lost(String),
}

/// Looks an action up, and checks that its outputs are whole.
///
/// # Errors
/// The store cannot be read.
pub fn look_up(store: &Store, key: &ActionKey) -> Result<Answer, StoreError> {
    let Some(record) = store.summary(key)? else { return Ok(Answer::Unknown) };
    for (port, content) in &record.outputs {
        if !store.check(content)?.is_intact() {
            return Ok(Answer::Lost(port.clone()));
        }
    }
    Ok(Answer::Ready(record))
}

/// Why a stage whose result is not there has to run, in words.
pub fn reason(store: &Store, answer: &Answer, action: &Action, history: &History, stage: &str) -> String {
    if let Answer::Lost(port) = answer {
        return format!("its output `{port}` is gone or damaged");
    }
    let Some(last) = history.last(stage) else { return "never ran".into() };
    match differences(store, &last, &action.manifest) {
        Some(lines) if !lines.is_empty() => lines.join("; "),
        Some(_) => "its record is gone".into(),
        None => "its last record is gone".into(),
    }
}

/// What is different between a recorded action and this manifest; `None` if the record is gone or of another format.
fn differences(store: &Store, earlier: &ActionKey, manifest: &Manifest) -> Option<Vec<String>> {
    let record = store.record(earlier).ok().flatten()?;
    let earlier: Manifest = serde_json::from_value(record.manifest).ok()?;
    Some(manifest.diff(&earlier).iter().map(ToString::to_string).collect())
}
