//! What the tests of stages share: running a stage by its kind on files in a temporary folder.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{Failure, StageContext, StageError, StopFlag, WorkerEvent, kind, rows::MemoryMemo};

/// A temporary folder with input files in it.
pub struct Bench {
    folder: Arc<TempDir>,
    inputs: BTreeMap<String, PathBuf>,
    outputs: BTreeMap<String, String>,
    threads: usize,
    devices: usize,
    memo: MemoryMemo,
}

/// What a stage wrote and said; keeps the folder.
#[derive(Debug)]
pub struct Ran {
    _folder: Arc<TempDir>,
    pub outputs: BTreeMap<String, PathBuf>,
    pub events: Vec<WorkerEvent>,
}

impl Bench {
    pub fn new() -> Self {
        Self {
            folder: Arc::new(tempfile::tempdir().unwrap()),
            inputs: BTreeMap::new(),
            outputs: BTreeMap::new(),
            threads: 1,
            devices: 0,
            memo: MemoryMemo::default(),
        }
    }

    /// Leases so many made-up devices.
    pub fn devices(mut self, devices: usize) -> Self {
        self.devices = devices;
        self
    }

    /// Keeps rows in this memo, which outlives the bench.
    pub fn memo(mut self, memo: &MemoryMemo) -> Self {
        self.memo = memo.clone();
        self
    }

    /// Declares an output, for kinds that let the pipeline do so.
    pub fn output(mut self, port: &str, file: &str) -> Self {
        self.outputs.insert(port.to_owned(), file.to_owned());
        self
    }

    /// Runs stages on this many threads.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    /// Writes `content` to a file and connects it to `port`.
    pub fn input(mut self, port: &str, content: impl AsRef<[u8]>) -> Self {
        let path = self.folder.path().join(format!("input-{port}"));
        fs::write(&path, content).unwrap();
        self.inputs.insert(port.to_owned(), path);
        self
    }

    /// Connects an existing file or folder to `port`.
    pub fn input_path(mut self, port: &str, path: impl Into<PathBuf>) -> Self {
        self.inputs.insert(port.to_owned(), path.into());
        self
    }

    /// Runs a stage of the registry as the engine would: parameters resolved, ports from the parameters, outputs under
    /// their own names. Outputs of an earlier run of the kind on this bench are replaced.
    pub fn run(&self, kind_name: &str, params: Value) -> Result<Ran, StageError> {
        let kind = kind(kind_name).unwrap_or_else(|| panic!("no kind {kind_name}"));
        let params = kind.resolve_params(&params).map_err(|issues| StageError::params(format!("{issues:?}")))?;
        let ports = kind.ports(&params).unwrap();
        let folder = self.folder.path().join(kind_name);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        let scratch = self.folder.path().join("scratch");
        fs::create_dir_all(&scratch).unwrap();
        let fixed = ports.outputs.iter().map(|o| (o.name.to_string(), o.file.to_string()));
        let outputs: BTreeMap<String, PathBuf> =
            fixed.chain(self.outputs.clone()).map(|(port, file)| (port, folder.join(file))).collect();
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&events);
        let mut cx = StageContext::new(
            self.inputs.clone(),
            outputs.clone(),
            scratch,
            self.threads,
            Vec::new(),
            StopFlag::default(),
            move |event| sink.lock().unwrap().push(event),
        )
        .with_rows(self.memo.clone())
        .with_simulated_devices(self.devices);
        kind.run(&params, &mut cx)?;
        drop(cx);
        let events = std::mem::take(&mut *events.lock().unwrap());
        Ok(Ran { _folder: Arc::clone(&self.folder), outputs, events })
    }
}

impl Ran {
    pub fn path(&self, port: &str) -> &Path {
        &self.outputs[port]
    }

    pub fn text(&self, port: &str) -> String {
        fs::read_to_string(self.path(port)).unwrap()
    }

    pub fn json(&self, port: &str) -> Value {
        serde_json::from_str(&self.text(port)).unwrap()
    }

    /// An output of JSON Lines.
    pub fn lines(&self, port: &str) -> Vec<Value> {
        self.text(port).lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    }

    /// The last value of a metric.
    pub fn metric(&self, name: &str) -> Option<f64> {
        self.events.iter().rev().find_map(|e| match e {
            WorkerEvent::Metric { name: told, value, .. } if told == name => Some(*value),
            _ => None,
        })
    }

    /// All log lines, warnings included.
    pub fn logs(&self) -> Vec<&str> {
        self.events
            .iter()
            .filter_map(|e| match e {
                WorkerEvent::Log { message, .. } => Some(message.as_str()),
                _ => None,
            })
            .collect()
    }
}

/// Runs a stage on inputs given as `(port, text)`, on a number of threads.
pub fn run_on(threads: usize, kind: &str, params: Value, inputs: &[(&str, &str)]) -> Result<Ran, StageError> {
    inputs.iter().fold(Bench::new().threads(threads), |bench, (port, text)| bench.input(port, text)).run(kind, params)
}

/// As [`run_on`], on one thread.
pub fn run(kind: &str, params: Value, inputs: &[(&str, &str)]) -> Result<Ran, StageError> {
    run_on(1, kind, params, inputs)
}

/// Asserts that the stage refused its input, in words that hold all of `words`.
pub fn refuses(result: Result<Ran, StageError>, words: &[&str]) {
    let error = result.expect_err("the stage should have refused");
    assert_eq!(error.failure(), Failure::WrongInput, "{error}");
    let text = format!("{error} {}", error.help_text().unwrap_or_default());
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
}

/// The folder of test data that is not part of the repository; `None`, with a note, when it is not there.
pub fn shared_data() -> Option<PathBuf> {
    let path = std::env::var_os("GRLM_TEST_DATA").map(PathBuf::from);
    if path.is_none() {
        eprintln!("skipped: GRLM_TEST_DATA is not set");
    }
    path
}
