//! How many rows of a stage that would run are missing, and how long they will take.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use grlm_cache::{Digest, Store, StoreError};
use grlm_stages::{Device, Resources, StageContext, StageError, StopFlag};

use super::{
    decide::{Action, device_class},
    work::{Node, Source},
};
use crate::{key::DeviceClass, pipeline::Stage};

/// The rows of a stage as the store knows them.
#[derive(Debug, Clone, PartialEq)]
pub struct RowsForeseen {
    /// What a row is: `item`, `user`.
    pub unit: String,
    /// Distinct rows.
    pub total: usize,
    pub missing: usize,
    /// Seconds that the missing ones will take on the devices that the stage asks for, by what a row took last time.
    pub seconds: Option<f64>,
}

/// The metric by which a worker tells what a row took, in seconds on one device.
pub const SECONDS_PER_ROW: &str = "rows.seconds_per_row";

/// Why the rows of a stage cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum Untold {
    #[error(transparent)]
    Stage(#[from] StageError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot make a temporary folder: {0}")]
    Folder(#[from] std::io::Error),
}

impl Untold {
    pub fn help(&self) -> Option<String> {
        match self {
            Untold::Stage(error) => error.help_text().map(str::to_owned),
            Untold::Store(error) => error.help(),
            Untold::Folder(_) => None,
        }
    }
}

/// Looks the stage's rows up; `None` for what is no row stage. Its inputs are all known. `a_row` is what a row of it
/// takes, in seconds on one device.
///
/// # Errors
/// They cannot be told; for most reasons the run would fail too.
pub fn foresee(
    store: &Store,
    stage: &Stage,
    node: &Node,
    action: &Action,
    a_row: Option<f64>,
) -> Result<Option<RowsForeseen>, Untold> {
    let folder = tempfile::tempdir()?;
    let mut inputs = BTreeMap::new();
    for (port, source) in &node.sources {
        let path = match source {
            Source::File(path) => path.clone(),
            Source::Output { file, .. } => {
                let place = folder.path().join(port).join(file);
                store.stage_input(&action.inputs[port], &place)?;
                place
            }
        };
        inputs.insert(port.clone(), path);
    }
    let mut cx = context(inputs, folder.path(), stage, action);
    let Some(job) = stage.kind.plan_rows(&stage.params, &mut cx)? else { return Ok(None) };
    let mut keys: Vec<Digest> = job.keys.iter().map(|key| Digest::from_bytes(*key.as_bytes())).collect();
    keys.sort_unstable();
    keys.dedup();
    let mut rows = store.rows().namespace(&job.namespace)?;
    let mut missing = 0;
    // In parts, since results are read to know that they are whole.
    for part in keys.chunks(4096) {
        missing += rows.look_up(part)?.iter().filter(|row| row.is_none()).count();
    }
    let devices = match stage.resources.gpus {
        // How many that will be is not known before the run.
        0 | Resources::ALL_GPUS => 1.0,
        number => f64::from(number),
    };
    let seconds = if missing == 0 { Some(0.0) } else { a_row.map(|seconds| seconds * missing as f64 / devices) };
    Ok(Some(RowsForeseen { unit: job.unit, total: keys.len(), missing, seconds }))
}

/// A context in which keys can be made, and nothing else.
fn context(inputs: BTreeMap<String, PathBuf>, scratch: &Path, stage: &Stage, action: &Action) -> StageContext {
    // Keys of rows tell classes of devices apart, not devices.
    let devices = match device_class(stage) {
        Some(DeviceClass::Cuda) => vec![Device::Cuda(0)],
        _ => Vec::new(),
    };
    StageContext::new(inputs, BTreeMap::new(), scratch.to_owned(), 1, devices, StopFlag::default(), |_| {})
        .with_identity(action.identity())
}
