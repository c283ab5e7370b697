//! What stages were measured to need: how long they took, how much memory they held, and what they learnt the hard way
//! when memory ran out. Small files under `measured/` in the store; losing one loses experience, no results.
//!
//! | learnt | used for |
//! |---|---|
//! | seconds | the order of stages, the time left, `grlm plan --devices` |
//! | memory held on a GPU | the share of a stage that may share (`resources.share`) and says no `gpu_memory` |
//! | shares that were too small | a larger share, at last the whole GPU |
//! | how often it had to shrink | its first attempt begins that small |
//! | seconds a row | what `grlm plan` says of missing rows |

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use grlm_cache::{ActionKey, Digest, Store};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    device::{Machine, Request},
    key::Manifest,
    pipeline::Stage,
};

/// The experience with one stage: one kind, with these parameters, on GPUs of this size.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Of the last attempt that succeeded.
    #[serde(default)]
    pub seconds: f64,
    /// The pipeline that it succeeded in.
    #[serde(default)]
    pub pipeline: Option<String>,
    /// What it read there, in bytes.
    #[serde(default)]
    pub input_bytes: Option<u64>,
    /// The largest resident set, in bytes.
    #[serde(default)]
    pub memory: u64,
    /// The most held on one GPU, in bytes; `None` if it was not seen.
    #[serde(default)]
    pub gpu_memory: Option<u64>,
    /// The largest share of a GPU in which it ran out of memory.
    #[serde(default)]
    pub gpu_too_small: Option<u64>,
    /// How often it made its batches smaller before it fitted.
    #[serde(default)]
    pub out_of_memory: u32,
    /// Of a row, on one device.
    #[serde(default)]
    pub seconds_per_row: Option<f64>,
}

impl Measured {
    /// Nothing, if the stage never ran here.
    pub fn of(store: &Store, stage: &Stage, machine: &Machine) -> Self {
        read(&path(store, stage, &stage.params, machine)).unwrap_or_default()
    }

    /// Seconds a row, with these parameters or else with those of the stage's last action.
    pub fn seconds_per_row(store: &Store, stage: &Stage, machine: &Machine, last: Option<ActionKey>) -> Option<f64> {
        Self::of(store, stage, machine).seconds_per_row.or_else(|| {
            let earlier: Manifest = serde_json::from_value(store.record(&last?).ok()??.manifest).ok()?;
            read(&path(store, stage, &earlier.params, machine))?.seconds_per_row
        })
    }

    /// Seconds to expect in this pipeline, of inputs of this size. What the stage took in another one counts only if it
    /// had about as much to read there: equal parameters are no word of how much there is to do.
    pub fn seconds_in(&self, pipeline: &str, input_bytes: Option<u64>) -> Option<f64> {
        let about_as_much =
            |then: u64, now: u64| then <= now.saturating_mul(LIKE_SIZED) && now <= then.saturating_mul(LIKE_SIZED);
        let counts = self.pipeline.as_deref() == Some(pipeline)
            || self.input_bytes.zip(input_bytes).is_some_and(|(then, now)| about_as_much(then, now));
        Some(self.seconds).filter(|seconds| counts && *seconds > 0.0)
    }

    /// # Errors
    /// No space, no permission.
    pub fn write(&self, store: &Store, stage: &Stage, machine: &Machine) -> io::Result<()> {
        let path = path(store, stage, &stage.params, machine);
        let folder = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let mut staged = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer(&mut staged, self)?;
        staged.persist(path)?;
        Ok(())
    }

    /// What to ask for: a stage that may share a GPU asks for what it was measured to hold and a bit more, for more than
    /// was too little, and for the whole GPU if that is not known.
    pub fn request(&self, stage: &Stage, machine: &Machine) -> Request {
        let mut request = Request::from(stage.resources);
        if stage.resources.share && request.gpu_memory.is_none() && request.gpus > 0 {
            request.gpu_memory = self.gpu_memory.map(|held| held + held / 8 + SLACK);
        }
        if let (Some(share), Some(too_small)) = (request.gpu_memory, self.gpu_too_small)
            && share <= too_small
        {
            let largest = machine.gpus.iter().map(|gpu| gpu.memory).max().unwrap_or(0);
            request.gpu_memory = Some(too_small.saturating_mul(2)).filter(|share| *share < largest);
        }
        request
    }
}

/// Inputs whose sizes differ by no more than this factor are about as large.
const LIKE_SIZED: u64 = 2;

/// A context and libraries take this much before a measurement sees any of it.
const SLACK: u64 = 512 << 20;

fn read(path: &Path) -> Option<Measured> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn path(store: &Store, stage: &Stage, params: &Value, machine: &Machine) -> PathBuf {
    let gpu = if stage.resources.gpus > 0 { machine.gpus.iter().map(|gpu| gpu.memory).max() } else { None };
    let text = format!("{}\n{}\n{params}\n{gpu:?}", stage.name, stage.kind.name());
    store.root().join("measured").join(format!("{}.json", &Digest::of(text.as_bytes()).hex()[..32]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_pipelines_time_counts_for_inputs_of_about_the_same_size() {
        let seen =
            Measured { seconds: 3.0, pipeline: Some("small".into()), input_bytes: Some(100), ..Measured::default() };
        assert_eq!(seen.seconds_in("small", None), Some(3.0));
        assert_eq!(seen.seconds_in("small", Some(10_000)), Some(3.0));
        let of_other = |bytes| seen.seconds_in("large", bytes);
        assert_eq!([50, 100, 200].map(|bytes| of_other(Some(bytes))), [Some(3.0); 3]);
        assert_eq!([Some(49), Some(201), None].map(of_other), [None; 3]);
        let old = Measured { seconds: 3.0, ..Measured::default() };
        assert_eq!(old.seconds_in("small", Some(0)), None, "nobody knows what it had to do");
        assert_eq!(Measured { seconds: 0.0, ..seen.clone() }.seconds_in("small", None), None, "never succeeded");
    }
}
