//! The file that tells a worker what to do. Nothing in it belongs to this machine but paths, so that a launcher for
//! a cluster could start the same attempt elsewhere.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use grlm_stages::{Device, context::Identity, hub::PinnedModel};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::guard::Guard;

/// One attempt of one stage. All paths are absolute.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttemptSpec {
    /// The version of this file; see [`AttemptSpec::VERSION`].
    pub version: u32,
    /// The stage's name, for messages only.
    pub stage: String,
    /// Counted from 1.
    pub attempt: u32,
    /// How many earlier attempts ran out of memory: a stage makes its batches that many times smaller.
    pub out_of_memory: u32,
    pub kind: String,
    /// Resolved parameters, placeholders already replaced.
    pub params: Value,
    /// Port → path.
    pub inputs: BTreeMap<String, PathBuf>,
    /// Pretrained models by the parameter that names each.
    #[serde(default)]
    pub models: BTreeMap<String, PinnedModel>,
    /// Digests of the inputs and of a `command`'s program, for the keys of rows.
    pub identity: Identity,
    /// Port → path that does not exist yet, in a folder that does.
    pub outputs: BTreeMap<String, PathBuf>,
    /// Where unfinished work survives a failed attempt.
    pub scratch: PathBuf,
    /// The store's folder of rows; without it, results of rows are not kept.
    pub rows: Option<PathBuf>,
    /// The user's own files that this attempt reads: no row is kept once one of them looks otherwise.
    #[serde(default)]
    pub guards: Vec<Guard>,
    /// The working directory.
    pub directory: PathBuf,
    /// Leased cores.
    pub threads: usize,
    /// Leased devices as the worker numbers them.
    pub devices: Vec<Device>,
    /// Leased devices that are made up (`--devices sim:…`).
    pub simulated_devices: usize,
    /// [`Self::devices`] by UUID: the value of `CUDA_VISIBLE_DEVICES`. Empty hides every GPU.
    pub visible_devices: Vec<String>,
    /// Declared variables with their values.
    pub env: BTreeMap<String, String>,
    /// Names of variables passed on and not recorded.
    pub pass_env: Vec<String>,
    /// Names of variables passed on, not recorded, and blanked in logs and events.
    pub secrets: Vec<String>,
}

impl AttemptSpec {
    pub const VERSION: u32 = 1;
    pub const FILE: &str = "attempt.json";

    /// A spec with no inputs, outputs, devices or variables.
    pub fn new(stage: &str, kind: &str, params: Value, directory: &Path, scratch: &Path) -> Self {
        Self {
            version: Self::VERSION,
            stage: stage.to_owned(),
            attempt: 1,
            out_of_memory: 0,
            kind: kind.to_owned(),
            params,
            inputs: BTreeMap::new(),
            models: BTreeMap::new(),
            identity: Identity::default(),
            outputs: BTreeMap::new(),
            scratch: scratch.to_owned(),
            rows: None,
            guards: Vec::new(),
            directory: directory.to_owned(),
            threads: 1,
            devices: Vec::new(),
            simulated_devices: 0,
            visible_devices: Vec::new(),
            env: BTreeMap::new(),
            pass_env: Vec::new(),
            secrets: Vec::new(),
        }
    }

    /// Writes `attempt.json` into the attempt's folder.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        fs::write(folder.join(Self::FILE), serde_json::to_vec(self)?)
    }

    /// # Errors
    /// If the file is missing, not a spec, or of another version.
    pub fn read(folder: &Path) -> io::Result<Self> {
        let bytes = fs::read(folder.join(Self::FILE))?;
        let spec: Self = serde_json::from_slice(&bytes)?;
        if spec.version != Self::VERSION {
            return Err(io::Error::other(format!("version {}, expected {}", spec.version, Self::VERSION)));
        }
        Ok(spec)
    }
}
