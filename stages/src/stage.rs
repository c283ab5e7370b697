//! What a stage is: typed parameters, named and typed ports, default resources, and a function over paths.
//!
//! Validation, `grlm stages`, the JSON Schema and editor completion all follow from these types; nothing about a
//! kind is written down twice. How results are cached, and where they run, is the orchestrator's business.

use std::{borrow::Cow, collections::BTreeMap};

use schemars::JsonSchema;
use serde::{Serialize, de::DeserializeOwned};

use crate::{Artifact, StageContext, StageError, rows::RowJob};

/// One kind of stage. Implementors are unit structs named after the kind and listed in [`crate::registry`].
pub trait Stage: Send + Sync + 'static {
    /// The name used in `uses:`.
    const KIND: &'static str;
    /// One line for `grlm stages`.
    const SUMMARY: &'static str;
    /// Whether results may differ in their last bits between classes of device. If so, the device class enters
    /// the action key.
    const FLOATING_POINT: bool = false;
    /// Whether it makes its batches smaller when told that earlier attempts ran out of memory
    /// ([`StageContext::out_of_memory`]): then it is worth trying again.
    const SHRINKS: bool = false;
    /// The `with:` block. Every field has a default unless the stage cannot run without it, carries a doc comment
    /// (it becomes the documentation), and the type denies unknown fields.
    type Params: Serialize + DeserializeOwned + JsonSchema + Send + Sync;

    /// Inputs and outputs, known from the parameters alone, when planning.
    fn ports(params: &Self::Params) -> Ports;

    /// What one attempt needs, unless the pipeline says otherwise.
    fn resources(_params: &Self::Params) -> Resources {
        Resources::default()
    }

    /// What to change so that an attempt needs no more than `memory` bytes, in words, where [`Stage::resources`] asks
    /// for more.
    fn fitting(_params: &Self::Params, _memory: u64) -> Option<String> {
        None
    }

    /// Mistakes that types cannot express (a beam count of 0, two exclusive options). Found before anything runs.
    fn check(_params: &Self::Params) -> Vec<ParamIssue> {
        Vec::new()
    }

    /// Pretrained models that the stage loads itself: the parameter that names each, such as `encoder.model`, and the
    /// name. Their content enters the action key; [`StageContext::model`] gives their folders.
    fn models(_params: &Self::Params) -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    /// Environment variables whose values are secret: the parameter that names each, such as `extractor.api_key_env`,
    /// and the variable. The pipeline has to pass them on to the stage.
    fn secrets(_params: &Self::Params) -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    /// Mistakes in how the pipeline connected the stage that its [`Ports`] cannot express, for kinds whose ports are
    /// open. Found before anything runs; `path` is relative to `with`.
    fn check_ports(_params: &Self::Params, _inputs: &[&str], _outputs: &[&str]) -> Vec<ParamIssue> {
        Vec::new()
    }

    /// The rows that a run over these inputs would work through, so that `grlm plan` can say how many are missing;
    /// `None` for what is no row stage. Only inputs are there, and nothing may take long: no weights are loaded.
    ///
    /// # Errors
    /// As for [`Stage::run`]; then the plan says nothing about rows.
    fn plan_rows(_params: &Self::Params, _cx: &mut StageContext) -> Result<Option<RowJob>, StageError> {
        Ok(None)
    }

    /// Reads the input paths, writes the output paths.
    ///
    /// # Errors
    /// A [`StageError`] whose [`crate::Failure`] says whether a retry could help. Whatever was written is dropped.
    fn run(params: &Self::Params, cx: &mut StageContext) -> Result<(), StageError>;
}

/// A mistake in a parameter's value; `path` is relative to `with`, for example `extractor.max_attempts`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamIssue {
    pub path: String,
    pub message: String,
    pub help: Option<String>,
}

impl ParamIssue {
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: path.into(), message: message.into(), help: None }
    }

    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// The named, typed inputs and outputs of a stage.
#[derive(Debug, Clone, Default)]
pub struct Ports {
    pub inputs: Vec<Input>,
    pub outputs: Vec<Output>,
    /// Further inputs of any name are accepted, and hold this artifact (`evaluate` takes any number of rankings;
    /// `command` takes anything).
    pub open_inputs: Option<Artifact>,
    /// Outputs are declared by the pipeline (`outputs: { name: file }`), as for `command`.
    pub open_outputs: bool,
}

impl Ports {
    pub fn new(inputs: impl IntoIterator<Item = Input>, outputs: impl IntoIterator<Item = Output>) -> Self {
        Self {
            inputs: inputs.into_iter().collect(),
            outputs: outputs.into_iter().collect(),
            open_inputs: None,
            open_outputs: false,
        }
    }

    /// Accepts further inputs under names of the pipeline's choosing, each holding `artifact`.
    pub fn with_open_inputs(mut self, artifact: Artifact) -> Self {
        self.open_inputs = Some(artifact);
        self
    }
}

/// An input port. Every constructor takes the port's name, what it holds, and a line of documentation.
#[derive(Debug, Clone)]
pub struct Input {
    pub name: Cow<'static, str>,
    pub artifact: Artifact,
    pub required: bool,
    pub doc: Cow<'static, str>,
}

impl Input {
    pub fn required(name: &'static str, artifact: Artifact, doc: &'static str) -> Self {
        Self { name: name.into(), artifact, required: true, doc: doc.into() }
    }

    pub fn optional(name: &'static str, artifact: Artifact, doc: &'static str) -> Self {
        Self { name: name.into(), artifact, required: false, doc: doc.into() }
    }
}

/// An output port and the name of the file (or folder) that users find under `out/`.
#[derive(Debug, Clone)]
pub struct Output {
    pub name: Cow<'static, str>,
    pub artifact: Artifact,
    pub file: Cow<'static, str>,
    /// An empty file is a valid result (a list of invalid answers, for example).
    pub may_be_empty: bool,
    pub doc: Cow<'static, str>,
}

impl Output {
    pub fn new(name: &'static str, artifact: Artifact, file: impl Into<Cow<'static, str>>, doc: &'static str) -> Self {
        Self { name: name.into(), artifact, file: file.into(), may_be_empty: false, doc: doc.into() }
    }

    pub fn may_be_empty(mut self) -> Self {
        self.may_be_empty = true;
        self
    }
}

/// What one attempt of a stage needs while it runs. Not part of the action key.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Resources {
    /// Whole GPUs, all at once or not at all; [`Resources::ALL_GPUS`] takes all that the run may use, and the CPU where
    /// there is none.
    pub gpus: u32,
    /// Memory needed on each GPU, in bytes; `None` takes the GPU whole.
    pub gpu_memory: Option<u64>,
    /// Without `gpu_memory`: takes no more of a GPU than it was measured to need, once that is known.
    pub share: bool,
    /// CPU cores; the stage must not use more threads than it was leased.
    pub cpus: u32,
    /// Host memory, in bytes; 0 is not accounted for.
    pub memory: u64,
}

impl Default for Resources {
    fn default() -> Self {
        Self { gpus: 0, gpu_memory: None, share: false, cpus: 1, memory: 0 }
    }
}

impl Resources {
    pub const ALL_GPUS: u32 = u32::MAX;

    /// A stage that spreads over `cpus` cores.
    pub fn cpus(cpus: u32) -> Self {
        Self { cpus, ..Self::default() }
    }
}
