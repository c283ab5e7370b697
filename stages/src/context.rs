//! What a stage is given to work with: paths, devices, a place for unfinished work, and a voice.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    StageError, WorkerEvent,
    event::LogLevel,
    hub::{Hub, ModelName, PinnedModel},
    model_folder,
    rows::{self, MemoryMemo, Notes, RowDevice, RowMemo},
};

/// A device leased to the attempt. Inside the worker, CUDA devices are numbered from 0 because
/// `CUDA_VISIBLE_DEVICES` is set to the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    Cpu,
    Cuda(usize),
}

/// Set when the attempt should save what it has and stop; cheap to ask for in an inner loop.
#[derive(Debug, Clone, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    pub fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// How long the hub may take for the next byte.
const PATIENCE: Duration = Duration::from_secs(60);

/// Digests of what an attempt works on, as the engine took them for the action's key: hashing a model's weights again
/// for the keys of rows would take longer than some stages.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Port → digest of the input's content.
    pub inputs: BTreeMap<String, String>,
    /// Parameter → what tells the pretrained model apart that it names: a digest, or a repository and its commit.
    pub models: BTreeMap<String, String>,
    /// Of a `command`: its text before paths were put in, its declared code and its declared variables.
    pub program: Option<String>,
}

type Sink = Box<dyn FnMut(WorkerEvent) + Send>;

/// Everything one attempt of a stage may touch.
pub struct StageContext {
    inputs: BTreeMap<String, PathBuf>,
    outputs: BTreeMap<String, PathBuf>,
    models: BTreeMap<String, PinnedModel>,
    scratch: PathBuf,
    threads: usize,
    devices: Vec<Device>,
    simulated_devices: usize,
    rows: Box<dyn RowMemo>,
    identity: Identity,
    stop: StopFlag,
    attempt: u32,
    out_of_memory: u32,
    sink: Sink,
}

impl StageContext {
    /// `scratch` is a folder that survives failed attempts of the same action, for checkpoints; it is removed once
    /// the action's result is published. `threads` is the number of leased cores.
    pub fn new(
        inputs: BTreeMap<String, PathBuf>,
        outputs: BTreeMap<String, PathBuf>,
        scratch: PathBuf,
        threads: usize,
        devices: Vec<Device>,
        stop: StopFlag,
        sink: impl FnMut(WorkerEvent) + Send + 'static,
    ) -> Self {
        Self {
            inputs,
            outputs,
            models: BTreeMap::new(),
            scratch,
            threads: threads.max(1),
            devices,
            simulated_devices: 0,
            rows: Box::new(MemoryMemo::default()),
            identity: Identity::default(),
            stop,
            attempt: 1,
            out_of_memory: 0,
            sink: Box::new(sink),
        }
    }

    /// Says that this is not the first attempt: its number, counted from 1, and how many before it ran out of memory.
    pub fn with_attempt(mut self, attempt: u32, out_of_memory: u32) -> Self {
        self.attempt = attempt.max(1);
        self.out_of_memory = out_of_memory;
        self
    }

    /// The pretrained models of [`crate::Stage::models`], as they were pinned when the run was planned.
    pub fn with_models(mut self, models: BTreeMap<String, PinnedModel>) -> Self {
        self.models = models;
        self
    }

    /// The folder of the pretrained model that the parameter `place` names `name`; fetched from the hub where needed.
    ///
    /// # Errors
    /// The name is neither a folder nor a repository, the hub cannot be reached, the disk; a stop.
    pub fn model(&mut self, place: &str, name: &str) -> Result<PathBuf, StageError> {
        let hub = Hub::from_env(PATIENCE).until(&self.stop);
        let pinned = match self.models.get(place) {
            Some(pinned) => pinned.clone(),
            None => hub.pin(&ModelName::parse(name).map_err(StageError::params)?)?,
        };
        let mut told = 0;
        hub.open(&pinned, &mut |done, all| {
            // A few hundred times at most.
            if done == all || done.saturating_sub(told) > all / 200 {
                told = done;
                self.progress(done, all, "byte");
            }
            self.check_stop()
        })
    }

    /// Keeps results of rows in `memo`; without this they are kept as long as the program runs.
    pub fn with_rows(mut self, memo: impl RowMemo + 'static) -> Self {
        self.rows = Box::new(memo);
        self
    }

    /// Says what the inputs' digests are; without this they are taken when they are asked for.
    pub fn with_identity(mut self, identity: Identity) -> Self {
        self.identity = identity;
        self
    }

    /// Says that so many devices were leased that are not there: rows are spread over them all the same, each
    /// standing for a part of the leased cores.
    pub fn with_simulated_devices(mut self, devices: usize) -> Self {
        self.simulated_devices = devices;
        self
    }

    /// The number of this attempt, counted from 1.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// How many earlier attempts ran out of memory. A stage halves its batch (not its result) for each of them.
    pub fn out_of_memory_before(&self) -> u32 {
        self.out_of_memory
    }

    /// The path of a required input.
    ///
    /// # Errors
    /// A bug if the port is not connected: the planner checks required ports.
    pub fn input(&self, port: &str) -> Result<&Path, StageError> {
        self.optional_input(port).ok_or_else(|| StageError::bug(format!("input port `{port}` is not connected")))
    }

    pub fn optional_input(&self, port: &str) -> Option<&Path> {
        self.inputs.get(port).map(PathBuf::as_path)
    }

    /// All connected inputs, by port name in alphabetical order.
    pub fn inputs(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.inputs.iter().map(|(k, v)| (k.as_str(), v.as_path()))
    }

    /// A digest of an input's content (a file's bytes, or the names and bytes of all files in a folder), for the keys of
    /// rows: the same content always gives the same digest. Costs nothing when the engine took it already.
    ///
    /// # Errors
    /// The port is not connected, or its content cannot be read.
    pub fn input_digest(&self, port: &str) -> Result<String, StageError> {
        match self.identity.inputs.get(port) {
            Some(digest) => Ok(digest.clone()),
            None => rows::content_digest(self.input(port)?),
        }
    }

    /// What tells apart the content of the pretrained model that the parameter `place` names `name`, for the keys of rows.
    /// Costs nothing, and needs no network, when the engine pinned the model.
    ///
    /// # Errors
    /// As [`StageContext::model`], when it is not known yet.
    pub fn model_identity(&mut self, place: &str, name: &str) -> Result<String, StageError> {
        match self.identity.models.get(place) {
            Some(identity) => Ok(identity.clone()),
            None => rows::content_digest(&self.model(place, name)?),
        }
    }

    /// [`StageContext::model_identity`] where it can be told without a network: the engine pinned the model, or its folder
    /// is on disk.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn model_identity_at_hand(&mut self, place: &str, name: &str) -> Result<Option<String>, StageError> {
        let known = self.identity.models.contains_key(place) || model_folder::is_at_hand(name);
        known.then(|| self.model_identity(place, name)).transpose()
    }

    /// A digest of what a `command` runs: its text, declared code and declared variables. `None` for other kinds.
    pub fn program_digest(&self) -> Option<&str> {
        self.identity.program.as_deref()
    }

    /// Where to write an output: a path that does not exist yet, in a folder that does. Folder artifacts are
    /// created by the stage.
    ///
    /// # Errors
    /// A bug if the stage did not declare the port.
    pub fn output(&self, port: &str) -> Result<&Path, StageError> {
        self.outputs
            .get(port)
            .map(PathBuf::as_path)
            .ok_or_else(|| StageError::bug(format!("output port `{port}` was not declared")))
    }

    pub fn outputs(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.outputs.iter().map(|(k, v)| (k.as_str(), v.as_path()))
    }

    pub fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// Number of threads that the stage may use.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Leased devices; empty means the CPU.
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// What row jobs are spread over: the leased devices, else the made-up ones, else the CPU as one device. The leased
    /// cores are shared out among them.
    pub fn row_devices(&self) -> Vec<RowDevice> {
        let devices = match (self.devices.len(), self.simulated_devices) {
            (0, simulated) => vec![Device::Cpu; simulated.max(1)],
            _ => self.devices.clone(),
        };
        let (each, more) = (self.threads / devices.len(), self.threads % devices.len());
        let of = devices.len();
        let row_device = |(number, device)| {
            let threads = (each + usize::from(number < more)).max(1);
            RowDevice { number, device, of, threads, stop: self.stop.clone(), notes: Notes::default() }
        };
        devices.into_iter().enumerate().map(row_device).collect()
    }

    /// What a job of requests to a server is spread over: so many threads, of no device.
    pub(crate) fn row_requests(&self, at_once: usize) -> Vec<RowDevice> {
        let one = |number| RowDevice {
            number,
            device: Device::Cpu,
            of: at_once,
            threads: 1,
            stop: self.stop.clone(),
            notes: Notes::default(),
        };
        (0..at_once).map(one).collect()
    }

    pub(crate) fn take_rows(&mut self) -> Box<dyn RowMemo> {
        std::mem::replace(&mut self.rows, Box::new(MemoryMemo::default()))
    }

    pub(crate) fn put_rows(&mut self, rows: Box<dyn RowMemo>) {
        self.rows = rows;
    }

    pub fn stop_flag(&self) -> StopFlag {
        self.stop.clone()
    }

    /// # Errors
    /// [`StageError::Stopped`] once a stop was asked for; call it between units of work, after saving.
    pub fn check_stop(&self) -> Result<(), StageError> {
        if self.stop.is_set() { Err(StageError::Stopped) } else { Ok(()) }
    }

    pub fn emit(&mut self, event: WorkerEvent) {
        (self.sink)(event);
    }

    pub fn progress(&mut self, done: u64, total: u64, unit: &str) {
        self.emit(WorkerEvent::Progress { done, total, unit: unit.to_owned() });
    }

    pub fn metric(&mut self, name: &str, value: f64, step: Option<u64>) {
        self.emit(WorkerEvent::Metric { name: name.to_owned(), value, step });
    }

    pub fn info(&mut self, message: impl Into<String>) {
        self.emit(WorkerEvent::Log { level: LogLevel::Info, message: message.into() });
    }

    pub fn warn(&mut self, message: impl Into<String>) {
        self.emit(WorkerEvent::Log { level: LogLevel::Warn, message: message.into() });
    }
}
