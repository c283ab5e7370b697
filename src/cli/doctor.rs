//! `grlm doctor`: whether this machine, the store and a pipeline's weights, data and keys are fit to run.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
};

use grlm_cache::{Access, Store};
use grlm_stages::model_folder;
use serde::Serialize;

use super::{
    Global,
    request::{self, Part, Selected},
};
use crate::{
    device::{self, Selection, discover, host},
    engine::{
        secrets,
        work::{Source, Work},
    },
    error::CliError,
    events::human_bytes,
    exit_codes::Code,
    journal::{RunState, Runs},
};

/// Look at devices, disk and store, and at the weights, data and keys of a pipeline
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The pipeline file; without one, only the machine and the store are looked at
    file: Option<PathBuf>,
    /// A variant, or a cell of a matrix
    #[arg(long, value_name = "NAME", requires = "file")]
    variant: Option<String>,
    /// Another value for one path; may be repeated
    #[arg(long = "set", value_name = "PATH=VALUE", value_parser = request::assignment, requires = "file")]
    set: Vec<(String, String)>,
    /// GPUs to look for: `0,2`, `none`, or made-up ones; by default all that are found
    #[arg(long, value_name = "DEVICES", default_value = "all")]
    devices: Selection,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// How grave a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Grade {
    Ok,
    /// It works, and could be better.
    Note,
    /// Something cannot work.
    Wrong,
}

#[derive(Debug, Serialize)]
struct Finding {
    grade: Grade,
    about: &'static str,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    help: Option<String>,
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn ok(&mut self, about: &'static str, message: impl Into<String>) {
        self.0.push(Finding { grade: Grade::Ok, about, message: message.into(), help: None });
    }

    fn note(&mut self, about: &'static str, message: impl Into<String>, help: &str) {
        self.0.push(Finding { grade: Grade::Note, about, message: message.into(), help: Some(help.into()) });
    }

    fn wrong(&mut self, about: &'static str, message: impl Into<String>, help: Option<String>) {
        self.0.push(Finding { grade: Grade::Wrong, about, message: message.into(), help });
    }
}

pub fn run(args: &Args, global: &Global) -> Result<Code, CliError> {
    let mut findings = Findings::default();
    let machine = devices(&args.devices, &mut findings);
    store(&global.store, &mut findings);
    disk(&global.store, &mut findings);
    if let Some(file) = &args.file {
        let selected = Selected { file: file.clone(), variant: args.variant.clone(), set: args.set.clone() };
        let pipeline = selected.load()?;
        // Missing files are findings here, not the end.
        let work = request::work_unchecked(vec![pipeline], &Part::default())?;
        needs(&work, machine.as_ref(), &mut findings);
        data(&work, &mut findings);
        weights(&work, &mut findings);
        keys(&work, &mut findings);
    }
    let code = match findings.0.iter().any(|f| f.grade == Grade::Wrong) {
        true => Code::Check,
        false => Code::Ok,
    };
    if args.json {
        println!("{}", serde_json::to_string(&findings.0).unwrap_or_default());
        return Ok(code);
    }
    for Finding { grade, about, message, help } in &findings.0 {
        let word = match grade {
            Grade::Ok => "ok",
            Grade::Note => "note",
            Grade::Wrong => "wrong",
        };
        println!("{word:<6}{about:<9}{message}");
        if let Some(help) = help {
            println!("{:15}{help}", "");
        }
    }
    Ok(code)
}

fn devices(selection: &Selection, findings: &mut Findings) -> Option<device::Machine> {
    let machine = match discover::machine(selection, true) {
        Ok(machine) => machine,
        Err(error) => {
            findings.wrong("devices", error.to_string(), Some(error.help()));
            return None;
        }
    };
    findings.ok("devices", machine.to_string());
    for gpu in &machine.gpus {
        findings.ok("devices", format!("{}: {}, {}", gpu.name, gpu.uuid, human_bytes(gpu.memory)));
    }
    if machine.gpus.is_empty() && env::var_os("CUDA_VISIBLE_DEVICES").is_some_and(|value| !value.is_empty()) {
        findings.note("devices", "CUDA_VISIBLE_DEVICES is set, and no GPU is found", "unset it, or correct it");
    }
    let host::Place { folder, alone } = host::Place::of_this_machine();
    host::HostLeases::survey(&folder).into_iter().for_each(|held| findings.ok("devices", held));
    if let Err(error) = host::HostLeases::open(&folder, &machine) {
        let help = "leases of devices are kept there; GRLM_LEASES names another place".to_owned();
        findings.wrong("devices", error.to_string(), Some(help));
    } else if let Some(why) = alone {
        let help = "runs of other users may take the same devices; GRLM_LEASES names a folder that all may write to";
        findings.note("devices", format!("leases hold among your own runs alone ({why})"), help);
    }
    Some(machine)
}

fn store(path: &Path, findings: &mut Findings) {
    if let Err(error) = Store::check_place(path) {
        return findings.wrong("store", error.to_string(), error.help());
    }
    if !path.join("VERSION").exists() {
        return findings.ok("store", format!("{}: none yet, `grlm run` makes it", path.display()));
    }
    let store = match Store::open(path, Access::Write).or_else(|error| {
        findings.note("store", error.to_string(), "it can be read: `plan`, `explain`, `compare`");
        Store::open(path, Access::Read)
    }) {
        Ok(store) => store,
        Err(error) => return findings.wrong("store", error.to_string(), error.help()),
    };
    let (size, (limit, _)) = (store.size(), store.limit());
    let text = format!("{}: {} of {}", path.display(), human_bytes(size), human_bytes(limit));
    if size > limit {
        findings.note("store", text, "it is larger than its limit: `grlm gc` removes what was not used for longest");
    } else {
        findings.ok("store", text);
    }
    let runs = Runs::new(store.runs_dir());
    let records: Vec<_> = runs.list().into_iter().filter_map(|id| runs.record(&id).ok()).collect();
    for record in &records {
        match record.state() {
            RunState::Running => {
                findings.ok("store", format!("run {} goes on, process {}", record.id, record.process.pid));
            }
            RunState::Elsewhere if runs.is_fresh(&record.id) => {
                findings.ok("store", format!("run {} goes on, or did, on {}", record.id, record.process.host));
            }
            _ => {}
        }
    }
    match store.sweep_locks() {
        Ok(0) => {}
        Ok(n) => findings.ok("store", format!("{n} locks of dead processes removed")),
        Err(error) => findings.note("store", error.to_string(), "locks cannot be looked at"),
    }
    for holder in store.lock_holders() {
        findings.ok("store", format!("process {} on {} computes something", holder.process.pid, holder.process.host));
    }
    let quarantine = fs::read_dir(path.join("quarantine")).map_or(0, |entries| entries.count());
    if quarantine > 0 {
        let text = format!("{quarantine} blobs were not what their name says");
        findings.note("store", text, "a disk or another program damages files; `grlm verify` reads all of them");
    }
}

fn disk(path: &Path, findings: &mut Findings) {
    const LITTLE: u64 = 5 << 30;
    let existing = path.ancestors().find(|folder| folder.exists()).filter(|folder| !folder.as_os_str().is_empty());
    let existing = existing.unwrap_or(Path::new("."));
    let Ok(stat) = rustix::fs::statvfs(existing) else { return };
    let free = stat.f_bavail * stat.f_frsize;
    let text = format!("{} free", human_bytes(free));
    if stat.f_files > 0 && stat.f_favail < 10_000 {
        findings.note("disk", format!("{text}, and only {} files more", stat.f_favail), "`grlm gc` removes files");
    } else if free < LITTLE {
        findings.note("disk", text, "`grlm du` shows what the store holds, `grlm gc` makes it smaller");
    } else {
        findings.ok("disk", text);
    }
}

fn needs(work: &Work, machine: Option<&device::Machine>, findings: &mut Findings) {
    let Some(machine) = machine else { return };
    let pool = device::Pool::new(machine);
    for id in 0..work.nodes.len() {
        if let Err(unfit) = pool.check(work.stage(id).resources.into()) {
            let help = "change `--devices`, or the stage's `resources:`".to_owned();
            findings.wrong("devices", format!("stage `{}` {unfit}", work.nodes[id].label), Some(help));
        }
    }
}

fn data(work: &Work, findings: &mut Findings) {
    let mut seen = BTreeSet::new();
    for (id, node) in work.nodes.iter().enumerate() {
        let files = node.sources.iter().filter_map(|(port, source)| match source {
            Source::File(path) => Some((format!("input `{port}`"), path)),
            Source::Output { .. } => None,
        });
        let code = work.stage(id).code.iter().map(|path| ("code".to_owned(), path));
        for (what, path) in files.chain(code) {
            if !seen.insert(path) {
                continue;
            }
            match fs::metadata(path)
                .and_then(|m| if m.is_dir() { fs::read_dir(path).map(|_| None) } else { Ok(Some(m.len())) })
            {
                Ok(None) => findings.ok("data", format!("{}/", path.display())),
                Ok(Some(0)) => {
                    findings.wrong("data", format!("{} is empty ({what} of `{}`)", path.display(), node.label), None);
                }
                Ok(Some(bytes)) => findings.ok("data", format!("{}: {}", path.display(), human_bytes(bytes))),
                Err(error) => {
                    let text = format!("{}: {error} ({what} of `{}`)", path.display(), node.label);
                    findings.wrong(
                        "data",
                        text,
                        Some("correct the path, or set its variable with `--set vars.…`".into()),
                    );
                }
            }
        }
    }
}

/// Models that stages load themselves: a folder, or a repository in the hub's cache.
fn weights(work: &Work, findings: &mut Findings) {
    let models = |id| {
        let stage = work.stage(id);
        stage.kind.models(&stage.params).unwrap_or_default().into_values()
    };
    for model in (0..work.nodes.len()).flat_map(models).collect::<BTreeSet<String>>() {
        let folder = Path::new(&model);
        if folder.is_dir() {
            match lacks(folder).map(|what| format!("{model} has no {what}")).or_else(|| model_folder::damage(folder)) {
                None => findings.ok("weights", format!("{model}: {}", human_bytes(weight_bytes(folder)))),
                Some(what) => findings.wrong("weights", what, Some("copy the model's folder again".into())),
            }
            continue;
        }
        let repository = model.split('@').next().unwrap_or(&model);
        let name = format!("models--{}", repository.replace('/', "--"));
        let snapshots = hub_cache().join(name).join("snapshots");
        let found: Vec<PathBuf> = fs::read_dir(snapshots).into_iter().flatten().flatten().map(|e| e.path()).collect();
        match found.iter().find(|snapshot| lacks(snapshot).is_none()) {
            Some(whole) => findings.ok("weights", format!("{model}: {}", human_bytes(weight_bytes(whole)))),
            None if found.is_empty() => {
                let help = format!(
                    "not in {}; it is fetched when it is needed and the hub can be reached",
                    hub_cache().display()
                );
                findings.note("weights", format!("{model} is not on this machine"), &help);
            }
            None => {
                let what = found.iter().find_map(|snapshot| lacks(snapshot)).unwrap_or("weights");
                findings.wrong(
                    "weights",
                    format!("{model} is in the hub's cache without its {what}"),
                    Some("fetch it again".into()),
                );
            }
        }
    }
}

/// Variables that hold keys: of servers, without which their stages fail, and those that the pipeline calls secret.
/// That they are passed on to their stages is seen when the pipeline is read.
fn keys(work: &Work, findings: &mut Findings) {
    let stages = || (0..work.nodes.len()).map(|id| (&work.nodes[id].label, work.stage(id)));
    let mut of_servers = BTreeMap::new();
    for (label, stage) in stages() {
        for name in stage.kind.secrets(&stage.params).into_values() {
            of_servers.entry(name).or_insert(label);
        }
    }
    for (name, label) in &of_servers {
        if secrets::is_set(name) {
            findings.ok("keys", format!("`{name}` is set"));
        } else {
            let message = format!("`{label}` asks a server with the key in `{name}`, which is not set");
            let help = format!("export {name}; a stage of which every answer is known needs none");
            findings.wrong("keys", message, Some(help));
        }
    }
    let declared = stages().flat_map(|(label, stage)| stage.secrets.iter().map(move |name| (name, label)));
    let declared: BTreeMap<&String, &String> = declared.filter(|(name, _)| !of_servers.contains_key(*name)).collect();
    for (name, label) in declared {
        if secrets::is_set(name) {
            findings.ok("keys", format!("`{name}` is set"));
        } else {
            let message = format!("`{name}`, a secret of `{label}`, is not set");
            findings.note("keys", message, "export it where the stage's program needs it");
        }
    }
}

/// As the hub's own libraries find it.
fn hub_cache() -> PathBuf {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || set("HOME").unwrap_or_default().join(".cache");
    set("HF_HUB_CACHE")
        .or_else(|| Some(set("HF_HOME")?.join("hub")))
        .unwrap_or_else(|| set("XDG_CACHE_HOME").unwrap_or_else(home).join("huggingface/hub"))
}

/// What a model's folder lacks to be one.
fn lacks(folder: &Path) -> Option<&'static str> {
    if !folder.join("config.json").exists() {
        return Some("configuration");
    }
    if !folder.join("tokenizer.json").exists() {
        return Some("tokenizer");
    }
    (weight_bytes(folder) == 0).then_some("weights")
}

fn weight_bytes(folder: &Path) -> u64 {
    let is_weight = |path: &Path| path.extension().is_some_and(|extension| extension == "safetensors");
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|e| is_weight(&e.path())).filter_map(|e| fs::metadata(e.path()).ok()).map(|m| m.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unfinished_model_says_what_it_lacks() {
        let dir = tempfile::tempdir().unwrap();
        for (file, lacking) in [("x", "configuration"), ("config.json", "tokenizer"), ("tokenizer.json", "weights")] {
            fs::write(dir.path().join(file), "{}").unwrap();
            assert_eq!(lacks(dir.path()), Some(lacking));
        }
        fs::write(dir.path().join("model-00001-of-00002.safetensors"), "weights").unwrap();
        assert_eq!(lacks(dir.path()), None);
        assert_eq!(weight_bytes(dir.path()), 7);
    }
}
