//! One action from lock to record: the attempt's folder, the worker, its outputs checked and published.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use grlm_cache::{ActionRecord, Content, Provenance, RECORD_FORMAT, Store, StoreError};
use grlm_stages::{Artifact, Device, Failure, WorkerEvent, hub::PinnedModel};
use serde_json::Value;

use super::{
    decide::{self, Action, Answer},
    names::Names,
    outputs::{self, WrongOutput},
};
use crate::{
    events::Body,
    executor::{AttemptEnd, AttemptFailure, AttemptSpec, Launch, LaunchError, Launcher, StopReceiver, guard::Guard},
    pipeline::{SubstituteError, substitute},
};

/// What an attempt needs to know of its stage, owned, so that it can run beside the engine's loop.
#[derive(Debug, Clone)]
pub struct Job {
    pub label: String,
    pub pipeline: String,
    pub kind: &'static str,
    pub params: Value,
    pub action: Action,
    /// Port → where its content is.
    pub inputs: BTreeMap<String, JobInput>,
    pub outputs: Vec<JobOutput>,
    pub timeout: Option<Duration>,
    pub env: Vec<String>,
    pub pass_env: Vec<String>,
    pub secrets: Vec<String>,
    pub forced: bool,
}

#[derive(Debug, Clone)]
pub enum JobInput {
    /// A user's file, read where it lies.
    File(PathBuf),
    /// An earlier stage's output.
    Stored {
        /// Under this name it is shown.
        file: String,
        /// `stage.output`.
        from: String,
    },
}

#[derive(Debug, Clone)]
pub struct JobOutput {
    pub port: String,
    pub file: String,
    pub artifact: Artifact,
    pub may_be_empty: bool,
}

/// What was leased to the attempt.
#[derive(Debug, Clone, Default)]
pub struct Leased {
    pub cpus: usize,
    /// UUIDs or numbers, as `CUDA_VISIBLE_DEVICES` takes them.
    pub gpus: Vec<String>,
    /// Leased GPUs that are not there.
    pub simulated: usize,
    /// Its lock says that all this is taken.
    pub held: Option<Arc<File>>,
}

/// Which try of a job this is.
#[derive(Debug, Clone, Copy)]
pub struct Trial<'a> {
    /// Counted from 1.
    pub number: u32,
    /// How many earlier ones ran out of memory.
    pub out_of_memory: u32,
    pub log: &'a Path,
}

/// How an action ended.
#[derive(Debug)]
pub enum End {
    /// This attempt's result was published.
    Published {
        record: Box<ActionRecord>,
        duration: Duration,
    },
    /// Another process published it first.
    Reused(BTreeMap<String, Content>),
    Failed {
        failure: AttemptFailure,
        duration: Duration,
    },
    /// It failed, and is to be queued again: for other devices or for more of them. These GPUs are gone.
    Again {
        failure: AttemptFailure,
        duration: Duration,
        lost: Vec<String>,
    },
}

impl End {
    /// What the log of the attempt says of it.
    pub fn told(&self) -> Option<Body> {
        match self {
            End::Published { record, duration } => Some(Body::Finished {
                seconds: duration.as_secs_f64(),
                peak_memory: record.peak_memory,
                peak_gpu_memory: record.peak_gpu_memory,
            }),
            End::Reused(_) => None,
            End::Failed { failure, duration } | End::Again { failure, duration, .. } => {
                Some(Body::failed(failure.clone(), *duration, None))
            }
        }
    }
}

/// Something below the stage failed: the store or the start of the worker.
#[derive(Debug, thiserror::Error)]
pub enum AttemptError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Substitute(#[from] SubstituteError),
    #[error("cannot {action} {}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

impl AttemptError {
    pub fn as_failure(&self) -> AttemptFailure {
        let (message, help) = match self {
            Self::Store(error) => (format!("the store failed it: {error}"), error.help()),
            error => (error.to_string(), std::error::Error::source(error).map(ToString::to_string)),
        };
        AttemptFailure { failure: Failure::Environment, message, help, tail: Vec::new() }
    }
}

/// What all attempts of a run share.
#[derive(Clone)]
pub struct Workshop {
    pub store: Arc<Store>,
    pub launcher: Launcher,
    /// The working directory of commands.
    pub directory: PathBuf,
    pub run: String,
}

impl Workshop {
    /// Runs one attempt and publishes its result. The caller holds the action's lock throughout.
    ///
    /// # Errors
    /// Only what is not the stage's fault; a stage that fails is an [`End::Failed`].
    pub async fn attempt(
        &self,
        job: &Job,
        trial: &Trial<'_>,
        leased: &Leased,
        stop: StopReceiver,
        on_event: &mut dyn FnMut(WorkerEvent),
    ) -> Result<End, AttemptError> {
        let key = job.action.key;
        // Whoever had the lock before may have published it meanwhile.
        if !job.forced
            && trial.number == 1
            && let Answer::Ready(record) = decide::look_up(&self.store, &key)?
            && self.store.touch_record(&key, record.used_ms)
        {
            return Ok(End::Reused(record.outputs));
        }
        // Before the files are compared, so that no edit falls between. What cannot be looked at the stage itself misses.
        let guards = self.watched(job).iter().filter_map(|(_, path, _)| Guard::new(path).ok()).collect();
        if let Some(what) = self.changed(job) {
            let (message, help) = (format!("{what} changed since the run began"), Some("run again".to_owned()));
            let failure = AttemptFailure { failure: Failure::WrongInput, message, help, tail: Vec::new() };
            return Ok(End::Failed { failure, duration: Duration::ZERO });
        }
        let folder = self.store.new_attempt(&key)?;
        let mut spec = self.spec(job, trial, leased, &folder)?;
        spec.guards = guards;
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let launch = Launch {
            spec: &spec,
            folder: &folder,
            log: trial.log,
            timeout: job.timeout,
            grace: Launch::GRACE,
            held: leased.held.as_deref(),
        };
        let names = Names::new(job, &spec);
        let mut pass_on = |event| on_event(names.in_event(event));
        let AttemptEnd { result, duration, peak_memory, peak_gpu_memory, rows, .. } =
            self.launcher.run(&launch, stop, &mut pass_on).await?;
        if let Err(failure) = result {
            let mut failure = names.in_failure(failure);
            if is_full(&folder) {
                failure.help =
                    Some("the disk of the store is full; `grlm gc` frees space, `--store` names another".into());
            }
            self.forget(&folder);
            return Ok(End::Failed { failure, duration });
        }
        let (workshop, job, spec) = (self.clone(), job.clone(), spec);
        let published = tokio::task::spawn_blocking(move || -> Result<_, AttemptError> {
            let taken = match workshop.changed(&job) {
                Some(what) => Err(WrongOutput { message: format!("{what} changed while the stage ran"), help: None }),
                None => outputs::take(&workshop.store, &job.outputs, &spec.outputs)?,
            };
            let outputs = match taken {
                Ok(outputs) => outputs,
                Err(wrong) => {
                    workshop.forget(&folder);
                    return Ok(Err(wrong));
                }
            };
            let record = ActionRecord {
                format: RECORD_FORMAT,
                key: job.action.key,
                manifest: serde_json::to_value(&job.action.manifest).unwrap_or_default(),
                outputs,
                started_ms: u64::try_from(started.as_millis()).unwrap_or(u64::MAX),
                duration_ms: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
                peak_memory,
                peak_gpu_memory,
                rows,
                provenance: provenance(&workshop.run, &job.pipeline, &job.label),
                accepted: None,
            };
            workshop.store.publish(&record)?;
            workshop.store.clear_scratch(&job.action.key)?;
            Ok(Ok(record))
        })
        .await
        .map_err(|e| AttemptError::Io {
            action: "publish",
            path: self.store.root().to_owned(),
            source: io::Error::other(e),
        })??;
        Ok(match published {
            Ok(record) => End::Published { record: Box::new(record), duration },
            Err(WrongOutput { message, help }) => End::Failed {
                failure: AttemptFailure { failure: Failure::WrongInput, message, help, tail: Vec::new() },
                duration,
            },
        })
    }

    /// Lays out the attempt's folder: inputs under readable names, an empty folder for outputs.
    fn spec(&self, job: &Job, trial: &Trial<'_>, leased: &Leased, folder: &Path) -> Result<AttemptSpec, AttemptError> {
        let make = |path: &Path| {
            fs::create_dir_all(path).map_err(|source| AttemptError::Io { action: "create", path: path.into(), source })
        };
        let scratch = self.store.scratch(&job.action.key).join("kept");
        make(&scratch)?;
        let mut spec = AttemptSpec::new(&job.label, job.kind, job.params.clone(), &self.directory, &scratch);
        spec.attempt = trial.number;
        spec.out_of_memory = trial.out_of_memory;
        for (port, input) in &job.inputs {
            let path = match input {
                JobInput::File(path) => self.directory.join(path),
                JobInput::Stored { file, .. } => {
                    let dest = folder.join("in").join(port).join(file);
                    make(dest.parent().unwrap_or(folder))?;
                    self.store.stage_input(&job.action.inputs[port], &dest)?;
                    dest
                }
            };
            spec.inputs.insert(port.clone(), path);
        }
        spec.models = job.action.models.clone();
        make(&folder.join("out"))?;
        for output in &job.outputs {
            let path = folder.join("out").join(&output.file);
            make(path.parent().unwrap_or(folder))?;
            spec.outputs.insert(output.port.clone(), path);
        }
        if let Some(Value::String(run)) = spec.params.get("run").filter(|_| job.kind == "command") {
            let run = substitute(run, &spec.inputs, &spec.outputs)?;
            spec.params["run"] = Value::String(run);
        }
        spec.threads = leased.cpus.max(1);
        spec.devices = (0..leased.gpus.len()).map(Device::Cuda).collect();
        spec.visible_devices.clone_from(&leased.gpus);
        spec.simulated_devices = leased.simulated;
        spec.identity = job.action.identity();
        spec.rows = Some(self.store.rows().folder().to_owned());
        spec.env = job.env.iter().filter_map(|name| Some((name.clone(), std::env::var(name).ok()?))).collect();
        spec.pass_env.clone_from(&job.pass_env);
        spec.secrets.clone_from(&job.secrets);
        Ok(spec)
    }

    /// What of the user's own the result is made of: what it is, where it lies, and its digest when the run began.
    fn watched(&self, job: &Job) -> Vec<(String, PathBuf, String)> {
        let place = |path: &Path| self.directory.join(path);
        let inputs = job.inputs.iter().filter_map(|(port, input)| {
            let JobInput::File(path) = input else { return None };
            let what = format!("input `{port}` ({})", path.display());
            Some((what, place(path), job.action.inputs[port].digest.hex()))
        });
        let code = (job.action.manifest.code_files.iter())
            .map(|(path, digest)| (format!("code {path}"), place(Path::new(path)), digest.hex()));
        let models = job.action.models.iter().filter_map(|(parameter, model)| {
            let PinnedModel::Folder(folder) = model else { return None };
            let then = job.action.manifest.models.get(parameter)?.clone();
            Some((format!("the model of `{parameter}` ({})", folder.display()), place(folder), then))
        });
        inputs.chain(code).chain(models).collect()
    }

    /// What is no longer as it was when the run began: a result would belong to no known content. What is gone is no
    /// proof of that, since a program may have read it in time.
    fn changed(&self, job: &Job) -> Option<String> {
        let changed = |(_, path, then): &(String, PathBuf, String)| {
            self.store.digest(path).is_ok_and(|now| now.digest.hex() != *then)
        };
        self.watched(job).into_iter().find(changed).map(|(what, ..)| what)
    }

    /// Removes what a failed attempt left; checkpoints in the action's scratch stay.
    fn forget(&self, folder: &Path) {
        if let Err(error) = fs::remove_dir_all(folder) {
            tracing::warn!(%error, folder = %folder.display(), "a failed attempt's folder stays");
        }
    }
}

/// Whether what failed may have failed for want of space.
fn is_full(folder: &Path) -> bool {
    const NEXT_TO_NOTHING: u64 = 256 << 10;
    rustix::fs::statvfs(folder).is_ok_and(|disk| disk.f_bavail * disk.f_frsize < NEXT_TO_NOTHING)
}

/// Who makes a result, and where.
pub fn provenance(run: &str, pipeline: &str, stage: &str) -> Provenance {
    Provenance {
        host: fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned(),
        user: std::env::var("USER").unwrap_or_default(),
        grlm_version: env!("CARGO_PKG_VERSION").into(),
        run: run.into(),
        pipeline: pipeline.into(),
        stage: stage.into(),
    }
}
