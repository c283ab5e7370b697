//! From typed blocks to stages: kinds looked up, parameters completed, ports connected, cycles found.

use std::{
    collections::{BTreeMap, HashSet},
    path::{Component, Path, PathBuf},
};

use grlm_stages::{Artifact, Output, Ports, Resources, StageKind};
use petgraph::{algo::tarjan_scc, graph::DiGraph};
use rayon::prelude::*;
use rustc_hash::FxHashMap;
use serde_json::{Map, Value};

use super::{
    InputSource, Stage, StageName, hint,
    mistake::{KeyPath, Mark, Mistake, below, path},
    repair::{every_mistake, keys, typed},
    spec::{DeclaredOutput, FileInput, FileSpec, Shown, StageSpec},
    template::{Piece, PortReference, pieces, port_reference},
};

/// The kind whose outputs a pipeline names and whose text names ports.
pub(super) const COMMAND: &str = "command";

/// A stage on its way: what could be made out of it so far.
struct Draft {
    name: String,
    at: KeyPath,
    spec: Option<StageSpec>,
    kind: Option<&'static dyn StageKind>,
    params: Value,
    /// `None` if the parameters or the kind are not known: nothing is said about its ports then.
    ports: Option<Ports>,
    outputs: Vec<Output>,
    resources: Resources,
    mistakes: Vec<Mistake>,
}

/// The pipeline's name and its stages. What is wrong is added to `mistakes`; with mistakes, the result is not to be
/// used.
pub(super) fn resolve(
    root: Map<String, Value>,
    poisoned: &HashSet<KeyPath>,
    mistakes: &mut Vec<Mistake>,
) -> Option<(Option<String>, Vec<Stage>)> {
    let file = typed::<FileSpec>(&Value::Object(root), &[], poisoned, mistakes)?;
    if let Some(name) = &file.name {
        check_name(name, "pipeline", &path(&["name"]), Mark::Value, mistakes);
    }
    if file.stages.is_empty() {
        mistakes.push(Mistake::key(&path(&["stages"]), "the pipeline has no stages"));
    }
    let stages: Vec<(String, Value)> = file.stages.into_iter().collect();
    let mut drafts: Vec<Draft> =
        stages.into_par_iter().map(|(name, value)| Draft::read(name, &value, poisoned)).collect();
    let by_name: FxHashMap<&str, usize> = drafts.iter().enumerate().map(|(i, d)| (d.name.as_str(), i)).collect();
    let connected: Vec<BTreeMap<String, InputSource>> =
        drafts.iter().map(|draft| connect(draft, &drafts, &by_name, mistakes)).collect();
    drop(by_name);
    find_cycles(&drafts, &connected, mistakes);
    for draft in &mut drafts {
        mistakes.append(&mut draft.mistakes);
    }
    if !mistakes.is_empty() {
        return None;
    }
    let stages =
        drafts.into_iter().zip(connected).map(|(draft, inputs)| draft.finish(inputs)).collect::<Option<_>>()?;
    Some((file.name, stages))
}

impl Draft {
    fn read(name: String, value: &Value, poisoned: &HashSet<KeyPath>) -> Self {
        let at = path(&["stages", &name]);
        let mut draft = Self {
            name,
            at,
            spec: None,
            kind: None,
            params: Value::Null,
            ports: None,
            outputs: Vec::new(),
            resources: Resources::default(),
            mistakes: Vec::new(),
        };
        draft.fill(value, poisoned);
        draft
    }

    fn fill(&mut self, value: &Value, poisoned: &HashSet<KeyPath>) {
        check_name(&self.name, "stage", &self.at, Mark::Key, &mut self.mistakes);
        let Some(spec) = typed::<StageSpec>(value, &self.at, poisoned, &mut self.mistakes) else { return };
        self.kind = grlm_stages::kind(&spec.uses);
        if let Some(kind) = self.kind {
            self.fill_kind(kind, &spec, poisoned);
        } else {
            let at = below(&self.at, &["uses"]);
            if !poisoned.contains(&at) {
                let names = grlm_stages::kinds().iter().map(|k| k.name());
                let help = hint::nearest(&spec.uses, names).map(|near| format!("did you mean `{near}`?"));
                self.mistakes.push(
                    Mistake::value(&at, format!("unknown kind `{}`", spec.uses))
                        .help(help.unwrap_or_else(|| "`grlm stages` lists the kinds".to_owned())),
                );
            }
        }
        self.check_environment(&spec);
        self.spec = Some(spec);
    }

    fn fill_kind(&mut self, kind: &'static dyn StageKind, spec: &StageSpec, poisoned: &HashSet<KeyPath>) {
        let at = below(&self.at, &["with"]);
        let params = kind
            .resolve_params(&spec.with)
            .ok()
            .or_else(|| every_mistake(&spec.with, &at, poisoned, &mut self.mistakes, |with| kind.resolve_params(with)));
        let Some(params) = params else { return };
        match (kind.ports(&params), kind.resources(&params)) {
            (Ok(ports), Ok(resources)) => {
                self.resources = resources;
                self.outputs = ports.outputs.clone();
                if ports.open_outputs {
                    self.declare_outputs(spec);
                } else if let Some(port) = spec.outputs.keys().next() {
                    self.mistakes.push(
                        Mistake::key(
                            &below(&self.at, &["outputs", port]),
                            format!("the outputs of `{}` are fixed", kind.name()),
                        )
                        .help(format!("`grlm stages {}` lists them", kind.name())),
                    );
                }
                self.override_resources(spec);
                self.ports = Some(ports);
            }
            (Err(issues), _) | (_, Err(issues)) => {
                for issue in issues {
                    self.mistakes
                        .push(Mistake::value(&below(&at, &keys(&issue.path)), issue.message).maybe_help(issue.help));
                }
            }
        }
        let inputs: Vec<&str> = spec.inputs.keys().map(String::as_str).collect();
        let outputs: Vec<&str> = self.outputs.iter().map(|o| o.name.as_ref()).collect();
        let issues = kind.check_ports(&params, &inputs, &outputs);
        self.mistakes.extend(
            issues.into_iter().map(|i| Mistake::value(&below(&at, &keys(&i.path)), i.message).maybe_help(i.help)),
        );
        if kind.name() == COMMAND {
            self.check_run(&params, spec);
        } else if !spec.code.is_empty() {
            self.mistakes.push(
                Mistake::key(&below(&self.at, &["code"]), format!("`code` has no meaning for `{}`", kind.name()))
                    .help("only a `command` runs code of the pipeline's own"),
            );
        }
        self.params = params;
    }

    fn override_resources(&mut self, spec: &StageSpec) {
        let wanted = &spec.resources;
        let resources = &mut self.resources;
        resources.share = wanted.share.unwrap_or(resources.share);
        resources.gpus = wanted.gpus.map_or(resources.gpus, |g| g.0);
        resources.cpus = wanted.cpus.unwrap_or(resources.cpus);
        resources.memory = wanted.memory.map_or(resources.memory, |m| m.0);
        if let Some(memory) = wanted.gpu_memory {
            resources.gpu_memory = Some(memory.0);
        }
        let undecided = resources.gpus == Resources::ALL_GPUS && self.kind.is_some_and(|k| k.floating_point());
        if undecided {
            let at = below(&self.at, &["resources", "gpus"]);
            let message = "results of this kind differ in their last bits between CPU and GPU: say how many GPUs";
            self.mistakes.push(Mistake::value(&at, message).help("a number; 0 computes on the CPU"));
        }
        if resources.cpus == 0 {
            let at = below(&self.at, &["resources", "cpus"]);
            self.mistakes.push(Mistake::value(&at, "a stage needs at least one core"));
        }
    }

    /// The outputs that a pipeline declares: names, and files that stay in the stage's folder and apart.
    fn declare_outputs(&mut self, spec: &StageSpec) {
        let mut taken: Vec<(PathBuf, String)> = Vec::new();
        for (port, value) in &spec.outputs {
            let mut at = below(&self.at, &["outputs", port]);
            let declared = match value {
                Value::String(file) => Some(DeclaredOutput { file: file.clone(), may_be_empty: false }),
                Value::Object(_) => {
                    let declared = typed(value, &at, &HashSet::new(), &mut self.mistakes);
                    at.push("file".to_owned());
                    declared
                }
                other => {
                    self.mistakes.push(
                        Mistake::value(&at, format!("expected a file name, found {}", Shown(other)))
                            .help("for example `out: result.txt`, or `out: { file: result.txt, may_be_empty: true }`"),
                    );
                    None
                }
            };
            check_port_name(port, &below(&self.at, &["outputs", port]), &mut self.mistakes);
            let Some(declared) = declared else { continue };
            let file = match inside(&declared.file) {
                Ok(file) => file,
                Err(why) => {
                    self.mistakes.push(
                        Mistake::value(&at, format!("the output path `{}` {why}", declared.file))
                            .help("name a file in the stage's own folder, such as `result.txt`"),
                    );
                    continue;
                }
            };
            if let Some((other, first)) =
                taken.iter().find(|(other, _)| file.starts_with(other) || other.starts_with(&file))
            {
                let message = if *other == file {
                    format!("outputs `{first}` and `{port}` have the same path `{}`", declared.file)
                } else {
                    format!("one of the outputs `{first}` and `{port}` is inside the other")
                };
                self.mistakes.push(Mistake::value(&at, message).help("give each output a path of its own"));
            }
            let mut output = Output::new("", Artifact::Any, file.display().to_string(), "");
            output.name = port.clone().into();
            output.may_be_empty = declared.may_be_empty;
            self.outputs.push(output);
            taken.push((file, port.clone()));
        }
        if spec.outputs.is_empty() {
            self.mistakes.push(
                Mistake::key(&self.at, format!("stage `{}` declares no outputs", self.name))
                    .help("`outputs: { out: result.txt }`; its result is what it writes to `${outputs.out}`"),
            );
        }
    }

    /// The ports that the text of a `command` names.
    fn check_run(&mut self, params: &Value, spec: &StageSpec) {
        let at = below(&self.at, &["with", "run"]);
        let Some(run) = params.get("run").and_then(Value::as_str) else { return };
        for piece in pieces(run) {
            let Piece::Reference(reference) = piece else { continue };
            let (port, known, side) = match port_reference(reference) {
                Some(PortReference::Input(port)) => (port, &spec.inputs, "input"),
                Some(PortReference::Output(port)) => (port, &spec.outputs, "output"),
                None => continue,
            };
            if !known.contains_key(port) {
                let help = hint::help(port, known.keys().map(String::as_str))
                    .unwrap_or_else(|| format!("declare it under `{side}s`"));
                self.mistakes.push(
                    Mistake::new(
                        &at,
                        Mark::Text(format!("${{{reference}}}")),
                        format!("stage `{}` has no {side} `{port}`", self.name),
                    )
                    .help(help),
                );
            }
        }
    }

    fn check_environment(&mut self, spec: &StageSpec) {
        for (block, names) in [("env", &spec.env), ("pass_env", &spec.pass_env), ("secrets", &spec.secrets)] {
            for (i, name) in names.iter().enumerate() {
                let mut characters = name.chars();
                let first = characters.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
                if !first || !characters.all(|c| c.is_ascii_alphanumeric() || c == '_') {
                    self.mistakes.push(
                        Mistake::value(
                            &below(&self.at, &[block, &i.to_string()]),
                            format!("`{name}` is not the name of an environment variable"),
                        )
                        .help("names only; values come from the environment that `grlm` runs in"),
                    );
                }
            }
        }
    }

    fn finish(self, inputs: BTreeMap<String, InputSource>) -> Option<Stage> {
        let spec = self.spec?;
        let sorted = |mut names: Vec<String>| {
            names.sort();
            names.dedup();
            names
        };
        Some(Stage {
            name: StageName(self.name),
            kind: self.kind?,
            description: spec.description,
            params: self.params,
            inputs,
            outputs: self.outputs,
            resources: self.resources,
            timeout: spec.timeout.map(|t| t.0),
            retries: spec.retries,
            env: sorted(spec.env),
            pass_env: sorted(spec.pass_env),
            secrets: sorted(spec.secrets),
            code: spec.code.into_iter().map(PathBuf::from).collect(),
        })
    }
}

/// Connects a stage's inputs.
fn connect(
    draft: &Draft,
    drafts: &[Draft],
    by_name: &FxHashMap<&str, usize>,
    mistakes: &mut Vec<Mistake>,
) -> BTreeMap<String, InputSource> {
    let mut connected = BTreeMap::new();
    let Some(spec) = &draft.spec else { return connected };
    for (port, value) in &spec.inputs {
        let at = below(&draft.at, &["inputs", port]);
        let wanted = draft
            .ports
            .as_ref()
            .map(|ports| ports.inputs.iter().find(|i| i.name == *port).map(|i| i.artifact).or(ports.open_inputs));
        match wanted {
            Some(None) => {
                let known = draft.ports.iter().flat_map(|p| &p.inputs).map(|i| i.name.as_ref());
                mistakes.push(
                    Mistake::key(&at, format!("`{}` has no input `{port}`", spec.uses))
                        .maybe_help(hint::help(port, known)),
                );
                continue;
            }
            Some(Some(_)) => check_port_name(port, &at, mistakes),
            None => {}
        }
        let source = match value {
            Value::String(reference) => stage_output(reference, &at, wanted.flatten(), port, drafts, by_name, mistakes),
            Value::Object(_) => typed::<FileInput>(value, &at, &HashSet::new(), mistakes).and_then(|input| {
                if input.file.is_empty() {
                    mistakes.push(Mistake::value(&below(&at, &["file"]), "the path is empty"));
                    return None;
                }
                Some(InputSource::File(PathBuf::from(input.file)))
            }),
            other => {
                mistakes.push(
                    Mistake::value(&at, format!("expected a stage's output or a file, found {}", Shown(other)))
                        .help("write `stage`, `stage.output`, or `{ file: PATH }`"),
                );
                None
            }
        };
        if let Some(source) = source {
            connected.insert(port.clone(), source);
        }
    }
    for input in draft.ports.iter().flat_map(|p| &p.inputs) {
        if input.required && !spec.inputs.contains_key(input.name.as_ref()) {
            let at = if spec.inputs.is_empty() { draft.at.clone() } else { below(&draft.at, &["inputs"]) };
            mistakes.push(
                Mistake::key(&at, format!("stage `{}` needs the input `{}`", draft.name, input.name))
                    .help(format!("it holds {}: {}", input.artifact, input.doc)),
            );
        }
    }
    connected
}

/// `stage` or `stage.output`.
fn stage_output(
    reference: &str,
    at: &[String],
    wanted: Option<Artifact>,
    port: &str,
    drafts: &[Draft],
    by_name: &FxHashMap<&str, usize>,
    mistakes: &mut Vec<Mistake>,
) -> Option<InputSource> {
    let (stage_name, output_name) = match reference.split_once('.') {
        Some((stage, output)) => (stage, Some(output)),
        None => (reference, None),
    };
    let Some(&stage) = by_name.get(stage_name) else {
        let help = if reference.contains('/') || Path::new(reference).exists() {
            Some(format!("for a file write `{{ file: {reference} }}`"))
        } else if mistakes.len() < 200 {
            hint::help(stage_name, drafts.iter().map(|d| d.name.as_str()))
        } else {
            None
        };
        mistakes.push(Mistake::value(at, format!("unknown stage `{stage_name}`")).maybe_help(help));
        return None;
    };
    let upstream = &drafts[stage];
    // What is wrong with the upstream is said there.
    upstream.ports.as_ref()?;
    let names = || upstream.outputs.iter().map(|o| o.name.as_ref());
    let output = match (output_name, upstream.outputs.as_slice()) {
        (None, [_]) => 0,
        (None, []) => return None,
        (None, outputs) => {
            // The one output whose type the port wants, if any, is the likely meaning.
            let mut fitting = outputs.iter().filter(|o| wanted == Some(o.artifact));
            let likely = match (fitting.next(), fitting.next()) {
                (Some(one), None) => format!("write `{stage_name}.{}`; ", one.name),
                _ => String::new(),
            };
            let known = names().collect::<Vec<_>>().join(", ");
            mistakes.push(
                Mistake::value(at, format!("stage `{stage_name}` has several outputs"))
                    .help(format!("{likely}its outputs: {known}")),
            );
            return None;
        }
        (Some(name), outputs) => match outputs.iter().position(|o| o.name == name) {
            Some(output) => output,
            None => {
                mistakes.push(
                    Mistake::value(at, format!("stage `{stage_name}` has no output `{name}`"))
                        .maybe_help(hint::help(name, names())),
                );
                return None;
            }
        },
    };
    let given = upstream.outputs[output].artifact;
    if let Some(wanted) = wanted
        && !wanted.accepts(given)
    {
        let fitting: Vec<String> = upstream
            .outputs
            .iter()
            .filter(|o| wanted.accepts(o.artifact))
            .map(|o| format!("`{stage_name}.{}`", o.name))
            .collect();
        mistakes.push(
            Mistake::value(at, format!("input `{port}` takes {wanted}, but `{reference}` holds {given}"))
                .maybe_help((!fitting.is_empty()).then(|| format!("{} would fit", fitting.join(" or ")))),
        );
    }
    Some(InputSource::Stage { stage, output })
}

/// One mistake for each group of stages that wait for each other.
fn find_cycles(drafts: &[Draft], connected: &[BTreeMap<String, InputSource>], mistakes: &mut Vec<Mistake>) {
    let sources = |stage: usize| {
        connected[stage].iter().filter_map(|(port, source)| match source {
            InputSource::Stage { stage, .. } => Some((port, *stage)),
            InputSource::File(_) => None,
        })
    };
    let mut graph = DiGraph::<(), (), u32>::with_capacity(drafts.len(), drafts.len() * 2);
    let nodes: Vec<_> = drafts.iter().map(|_| graph.add_node(())).collect();
    for stage in 0..drafts.len() {
        for (_, upstream) in sources(stage) {
            graph.add_edge(nodes[upstream], nodes[stage], ());
        }
    }
    for group in tarjan_scc(&graph) {
        let members: HashSet<usize> = group.iter().map(|n| n.index()).collect();
        let Some(&start) = members.iter().min() else { continue };
        // Walk upstream inside the group until a stage comes back: that stretch is a cycle.
        let mut walk = vec![start];
        let back = loop {
            let here = walk[walk.len() - 1];
            let Some((_, next)) = sources(here).find(|(_, s)| members.contains(s)) else { break None };
            match walk.iter().position(|s| *s == next) {
                Some(at) => break Some(at),
                None => walk.push(next),
            }
        };
        let Some(from) = back else { continue };
        let mut cycle: Vec<usize> = walk.split_off(from);
        cycle.reverse();
        // Begin with the stage that stands first in the file.
        if let Some(first) = cycle.iter().enumerate().min_by_key(|(_, s)| **s).map(|(i, _)| i) {
            cycle.rotate_left(first);
        }
        let Some((&head, &last)) = cycle.first().zip(cycle.last()) else { continue };
        let mut names: Vec<&str> = cycle.iter().map(|s| drafts[*s].name.as_str()).collect();
        names.push(names[0]);
        let shown = if names.len() > 12 {
            format!("{} → … → {}", names[..6].join(" → "), names[names.len() - 5..].join(" → "))
        } else {
            names.join(" → ")
        };
        let port = sources(head).find(|(_, s)| *s == last).map(|(p, _)| p.as_str()).unwrap_or_default();
        mistakes.push(
            Mistake::value(&below(&drafts[head].at, &["inputs", port]), format!("stages wait for each other: {shown}"))
                .help("one of these inputs must come from elsewhere"),
        );
    }
}

/// A path that stays inside the stage's folder.
fn inside(file: &str) -> Result<PathBuf, &'static str> {
    if file.trim().is_empty() {
        return Err("is empty");
    }
    let mut clean = PathBuf::new();
    for component in Path::new(file).components() {
        match component {
            Component::Normal(part) => clean.push(part),
            Component::CurDir => {}
            Component::ParentDir => return Err("leaves the stage's folder"),
            Component::RootDir | Component::Prefix(_) => return Err("is absolute"),
        }
    }
    if file.chars().any(char::is_control) {
        return Err("has control characters in it");
    }
    if clean.as_os_str().is_empty() { Err("names the folder itself") } else { Ok(clean) }
}

fn check_name(name: &str, what: &str, at: &[String], mark: Mark, mistakes: &mut Vec<Mistake>) {
    let fine = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > 100 || name.starts_with('-') || !name.chars().all(fine) {
        mistakes.push(
            Mistake::new(at, mark, format!("`{name}` is not a {what} name"))
                .help("letters, digits, `-` and `_`, at most 100; it names a folder"),
        );
    } else if what == "stage" && name == "vars" {
        mistakes.push(
            Mistake::new(at, mark, "`vars` is reserved").help("paths in `set` use it for variables; rename the stage"),
        );
    }
}

fn check_port_name(name: &str, at: &[String], mistakes: &mut Vec<Mistake>) {
    let fine = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > 100 || !name.chars().all(fine) {
        mistakes.push(
            Mistake::key(at, format!("`{name}` is not a port name")).help("letters, digits, `-` and `_`, at most 100"),
        );
    }
}
