//! The shortcut of a run in which nothing changed. What a whole, successful run found is remembered, with everything it
//! depends on: when the same request comes again and all of that is as it was, neither the pipeline is resolved nor a
//! key taken, and what is left to do is to look at the files. Ten thousand stages take less than their YAML's parsing.
//!
//! Looked at, and compared with the last run:
//!
//! | what | why |
//! |---|---|
//! | command line (file, variant, `--set`), folders, this program's code digests | they name the request |
//! | texts of the pipeline files | the stages |
//! | users' files and declared code, by content | inputs |
//! | declared environment variables | inputs |
//! | that every record is there, every output's blob whole and shown under `out/` | as a run would check |
//!
//! Pipelines that name pretrained models always take the loop, which asks what the names stand for now. Anything else than
//! "all equal" means that the loop runs as if there were no shortcut; losing the memory costs time.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
};

use grlm_cache::{ActionKey, Content, Digest, Store};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    history::History,
    models,
    run::{Ended, RunError},
    work::{Permission, Work},
};
use crate::{
    events::{Body, Counts, Event, Outcome, now},
    journal::Journal,
    key,
    pipeline::{self, Selection},
    progress::Reporter,
};

/// So many memories are kept in a store.
const KEPT: usize = 64;

/// A request as the command line gives it, before anything is read.
#[derive(Debug)]
pub struct Request<'a> {
    pub file: &'a Path,
    pub selection: &'a Selection,
    /// Where results are shown.
    pub out: &'a Path,
}

/// What a whole run found.
#[derive(Debug, Serialize, Deserialize)]
pub struct Memory {
    request: Digest,
    texts: Vec<(PathBuf, Digest)>,
    files: Vec<(PathBuf, Digest)>,
    /// Name and digest of the value, `None` where it is not set.
    env: Vec<(String, Option<Digest>)>,
    pipeline: String,
    variant: Option<String>,
    stages: Vec<Remembered>,
    /// Metrics that the run's end shows: variant, stage, file.
    pub metrics: Vec<(String, String, PathBuf)>,
    /// The folder of results.
    pub folder: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
struct Remembered {
    label: String,
    key: ActionKey,
    /// Content and the path that shows it.
    outputs: Vec<(Content, PathBuf)>,
}

impl Request<'_> {
    fn digest(&self) -> Option<Digest> {
        let mut hasher = blake3::Hasher::new();
        let mut add = |text: &[u8]| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text);
        };
        add(env!("CARGO_PKG_VERSION").as_bytes());
        add(&key::VERSION.to_le_bytes());
        for kind in grlm_stages::kinds() {
            add(kind.name().as_bytes());
            add(grlm_stages::code_digest(kind.name())?.as_bytes());
        }
        add(env::current_dir().ok()?.as_os_str().as_encoded_bytes());
        add(self.file.as_os_str().as_encoded_bytes());
        add(self.out.as_os_str().as_encoded_bytes());
        add(self.selection.variant.as_deref().unwrap_or_default().as_bytes());
        for (path, value) in &self.selection.set {
            add(path.as_bytes());
            add(value.as_bytes());
        }
        Some(Digest::from(hasher.finalize()))
    }
}

impl Memory {
    /// What is remembered of the request, if everything is still as it was.
    pub fn recall(store: &Store, request: &Request) -> Option<Self> {
        let digest = request.digest()?;
        let text = fs::read(place(store, &digest)).ok()?;
        let (checksum, text) = text.split_first_chunk::<32>()?;
        if blake3::hash(text).as_bytes() != checksum {
            return None;
        }
        let memory: Self = postcard::from_bytes(text).ok()?;
        (memory.request == digest && memory.holds(store)).then_some(memory)
    }

    fn holds(&self, store: &Store) -> bool {
        self.texts.iter().all(|(path, digest)| pipeline::text_digest(path) == Some(*digest))
            && self.env.iter().all(|(name, value)| value_digest(name) == *value)
            && self
                .files
                .par_iter()
                .all(|(path, digest)| store.digest(path).is_ok_and(|content| content.digest == *digest))
            && self.stages.par_iter().with_min_len(64).all(|stage| stage.holds(store))
    }

    /// Remembers a run of the whole pipeline that succeeded; of any other, nothing.
    pub fn keep(store: &Store, request: &Request, work: &Work, ended: &Ended) {
        if let Some(memory) = Self::of(request, work, ended)
            && let Err(error) = memory.write(store)
        {
            tracing::warn!(%error, "the next run will take the long way");
        }
    }

    fn of(request: &Request, work: &Work, ended: &Ended) -> Option<Self> {
        let [pipeline] = work.pipelines.as_slice() else { return None };
        let whole = work.nodes.iter().all(|node| node.permission == Permission::Run);
        // A repository's branch may have moved: that is for the loop to find out.
        let names_models = (0..work.nodes.len()).any(|id| !models::uses(work.stage(id)).is_empty());
        if !whole || names_models || ended.outcome != Outcome::Succeeded {
            return None;
        }
        let folder = request.out.join(pipeline.out_name());
        let variant = pipeline.variant.clone().unwrap_or_else(|| "default".into());
        let (mut stages, mut metrics, mut env) = (Vec::new(), Vec::new(), BTreeSet::new());
        for (node, done) in work.nodes.iter().zip(&ended.results) {
            let done = done.as_ref()?;
            let mut outputs = Vec::new();
            for place in &node.places {
                let stage = &pipeline.stages[place.stage];
                env.extend(stage.env.iter().cloned());
                for output in &stage.outputs {
                    let path = folder.join(stage.name.as_str()).join(output.file.as_ref());
                    if output.artifact == grlm_stages::Artifact::Metrics {
                        metrics.push((variant.clone(), stage.name.to_string(), path.clone()));
                    }
                    outputs.push((*done.outputs.get(output.name.as_ref())?, path));
                }
            }
            stages.push(Remembered { label: node.label.clone(), key: done.key, outputs });
        }
        let mut files: Vec<(PathBuf, Digest)> =
            ended.files.iter().map(|(path, content)| (path.clone(), content.digest)).collect();
        files.sort();
        Some(Self {
            request: request.digest()?,
            texts: pipeline.texts(),
            files,
            env: env.into_iter().map(|name| (name.clone(), value_digest(&name))).collect(),
            pipeline: pipeline.name.clone(),
            variant: pipeline.variant.clone(),
            stages,
            metrics,
            folder,
        })
    }

    fn write(&self, store: &Store) -> std::io::Result<()> {
        let text = postcard::to_stdvec(self).map_err(std::io::Error::other)?;
        let path = place(store, &self.request);
        let folder = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let mut staged = tempfile::NamedTempFile::new_in(folder)?;
        std::io::Write::write_all(&mut staged, blake3::hash(&text).as_bytes())?;
        std::io::Write::write_all(&mut staged, &text)?;
        staged.persist(&path)?;
        forget_oldest(folder)
    }

    /// Tells of the run that was spared, as the loop would have.
    ///
    /// # Errors
    /// The journal cannot be written.
    pub fn report(
        &self,
        store: &Store,
        command: Vec<String>,
        started: std::time::Instant,
        reporter: &mut dyn Reporter,
    ) -> Result<(), RunError> {
        let variant = self.variant.as_deref();
        let mut journal = Journal::create(&store.runs_dir(), &self.pipeline, variant, command)?;
        let run = journal.id().clone();
        let mut say = |stage: Option<&str>, body: Body| -> Result<(), RunError> {
            let event = Event { t: now(), run: run.clone(), stage: stage.map(str::to_owned), attempt: None, body };
            reporter.event(&event);
            Ok(journal.append(&event)?)
        };
        say(
            None,
            Body::RunStarted {
                version: crate::events::VERSION,
                pipeline: self.pipeline.clone(),
                variant: self.variant.clone(),
                stages: self.stages.len(),
            },
        )?;
        for stage in &self.stages {
            say(Some(&stage.label), Body::Cached { saved: None, key: Some(stage.key) })?;
        }
        // What `plan` compares with is the last run, also a spared one.
        let title = self.variant.as_ref().map_or_else(|| self.pipeline.clone(), |v| format!("{}@{v}", self.pipeline));
        let mut history = History::open(store.root(), &title);
        for stage in &self.stages {
            history.remember(&stage.label, stage.key);
        }
        if let Err(error) = history.write(&title) {
            tracing::warn!(%error, "what was run is not remembered for explanations");
        }
        let counts = Counts { cached: self.stages.len(), ..Counts::default() };
        say(None, Body::RunFinished { outcome: Outcome::Succeeded, counts, seconds: started.elapsed().as_secs_f64() })
    }
}

impl Remembered {
    fn holds(&self, store: &Store) -> bool {
        store.has_record(&self.key)
            && self.outputs.iter().all(|(content, path)| {
                store.check(content).is_ok_and(|health| health.is_intact()) && store.materialise(content, path).is_ok()
            })
    }
}

fn value_digest(name: &str) -> Option<Digest> {
    env::var(name).ok().map(|value| Digest::of(value.as_bytes()))
}

fn place(store: &Store, request: &Digest) -> PathBuf {
    store.root().join("latest").join("whole").join(&request.hex()[..32])
}

fn forget_oldest(folder: &Path) -> std::io::Result<()> {
    let mut files: Vec<_> = fs::read_dir(folder)?
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    files.sort();
    let surplus = files.len().saturating_sub(KEPT);
    files.into_iter().take(surplus).try_for_each(|(_, path)| fs::remove_file(path))
}
