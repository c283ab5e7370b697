//! Stage `train`: supervised fine-tuning of a Qwen3, or the training of a small one from scratch.
//!
//! Here: ports, and the order of work. Parameters are in [`params`]; [`data`] makes tokens of samples by the layout
//! that `generate` reads too (`crate::lm`); [`run`] is the loop; the model, its gradients and exact resume live in
//! `grlm_nn::train`. The result is a Hugging Face folder, with `grlm.json` in it.

use std::{collections::BTreeMap, fs, path::Path};

use grlm_nn::{
    Tokenizer,
    qwen3::Config,
    tokenizer::special,
    train::{Model, Session, export, init},
};
use serde_json::{Map, Value, json};

use crate::{
    Artifact, Input, Output, ParamIssue, Ports, Resources, Stage, StageContext, StageError,
    artifact::{CheckpointInfo, CurvePoint, Id2Meta, checkpoint::CHECKPOINT_VERSION, jsonl},
    generate::Normalize,
    lm::Layout,
    threads,
};

mod catalogue;
mod data;
mod llamafactory;
mod memory;
mod params;
mod recall;
mod run;
#[cfg(test)]
mod tests;
mod validation;

use catalogue::Catalogue;
pub use params::Params;
use params::{Backend, Method};
use run::{Files, Plan};

pub struct Train;

impl Stage for Train {
    const KIND: &'static str = "train";
    const SUMMARY: &'static str = "trains a language model on SFT samples: from scratch, in full, or by LoRA";
    const FLOATING_POINT: bool = true;
    const SHRINKS: bool = true;
    type Params = Params;

    fn ports(params: &Params) -> Ports {
        let model = match params.method {
            Method::Scratch => None,
            _ if params.model.is_some() => None,
            // That one of both is needed is said by `check_ports`, which names the parameter first.
            _ => Some(Input::optional("model", Artifact::Checkpoint, "the model to start from, without `model`")),
        };
        let inputs = [
            Input::required("sft", Artifact::Sft, "samples to learn from"),
            Input::optional("valid", Artifact::Sft, "samples to validate on"),
            Input::optional("holdout", Artifact::Holdout, "held-out items to validate on"),
            Input::optional(
                "id2meta",
                Artifact::Id2meta,
                "the catalogue: names held-out items, completes vocabularies",
            ),
        ];
        Ports::new(
            inputs.into_iter().chain(model),
            [
                Output::new("checkpoint", Artifact::Checkpoint, "checkpoint", "the model, as a Hugging Face folder"),
                Output::new("curve", Artifact::Curve, "curve.jsonl", "losses and learning rate by step"),
            ],
        )
        .with_open_inputs(Artifact::Sft)
    }

    fn resources(params: &Params) -> Resources {
        match params.backend {
            Backend::Grlm => Resources { memory: params.memory(), ..Resources::cpus(2) },
            Backend::Llamafactory => Resources { gpus: 1, ..Resources::cpus(2) },
        }
    }

    fn fitting(params: &Params, memory: u64) -> Option<String> {
        let config = params.config_at_hand()?;
        (params.memory() > memory).then(|| memory::advice(params, &config, params.max_length, memory))
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        params.check()
    }

    fn check_ports(params: &Params, inputs: &[&str], _outputs: &[&str]) -> Vec<ParamIssue> {
        let validation = &params.validation;
        let mut issues = llamafactory::settings::check_ports(params, inputs);
        if params.method != Method::Scratch && params.model.is_none() && !inputs.contains(&"model") {
            let (message, help) = without_model(params.method);
            issues.push(ParamIssue::new("method", message).help(help));
        }
        for name in params.weights.keys().filter(|name| !inputs.contains(&name.as_str())) {
            let issue = ParamIssue::new(format!("weights.{name}"), "is the weight of no input");
            issues.push(issue.help("weights are by the names of inputs that hold samples, such as `sft`"));
        }
        if inputs.contains(&"holdout") && inputs.contains(&"valid") {
            let issue = ParamIssue::new("", "both `holdout` and `valid` are connected, and one of them is looked at");
            issues.push(issue.help("leave one of them out"));
        }
        if inputs.contains(&"holdout") && !inputs.contains(&"id2meta") {
            let issue = ParamIssue::new("", "held-out items, and no `id2meta` to name them");
            issues.push(issue.help("connect `id2meta` too"));
        }
        if validation.recall && !inputs.contains(&"holdout") {
            let issue = ParamIssue::new("validation.recall", "needs held-out items");
            issues.push(issue.help("connect `holdout` and `id2meta`"));
        }
        let nothing = !inputs.contains(&"holdout") && !inputs.contains(&"valid") && validation.share == 0.0;
        if validation.patience.is_some() && nothing {
            let issue = ParamIssue::new("validation.patience", "there is nothing to validate on");
            issues.push(issue.help("connect `holdout` or `valid`, or set `validation.share`"));
        }
        issues
    }

    fn models(params: &Params) -> BTreeMap<String, String> {
        params.model.iter().map(|name| ("model".to_owned(), name.clone())).collect()
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let pool = threads::pool(cx)?;
        let files = data::read(params, cx)?;
        let id2meta = cx.optional_input("id2meta").map(Id2Meta::read).transpose()?;
        let base = match &params.model {
            Some(name) => Some(cx.model("model", name)?),
            None => cx.optional_input("model").map(Path::to_owned),
        };
        if base.is_none() && params.method != Method::Scratch {
            let (message, help) = without_model(params.method);
            return Err(StageError::params(message).help(help));
        }
        let layout = pool.install(|| data::layout(params, &files, id2meta.as_ref(), base.as_deref()))?;
        if let (Backend::Llamafactory, Some(base)) = (params.backend, &base) {
            return llamafactory::train(params, &files, &layout, base, cx);
        }
        let (mut corpus, counts) = pool.install(|| data::corpus(params, &files, &layout, cx))?;
        drop(files);
        cx.check_stop()?;
        let validation = validation::build(params, &layout, id2meta.as_ref(), &mut corpus, cx)?;

        let step = params.batch * params.accumulation;
        if step > corpus.epoch_len() {
            cx.warn(format!("a step of {step} samples is more than an epoch has: it takes {}", corpus.epoch_len()));
        }
        let longest = corpus.samples().chain(&validation.samples).map(|s| s.tokens.len()).max().unwrap_or(0);
        let mut model = begin(params, &layout, base.as_deref(), longest, cx)?;
        if params.normalize == Normalize::Allowed {
            let catalogue = Catalogue::new(params, &layout, id2meta.as_ref())?;
            let trie = catalogue.trie_for_losses(&layout, &corpus)?;
            model.choose_among(trie);
        }
        let recall = match params.validation.recall {
            true => Some(recall::Recall::new(params, &layout, id2meta.as_ref(), cx)?),
            false => None,
        };
        let plan = Plan::new(params, corpus.epoch_len());
        let settings = plan.settings(params, cx.out_of_memory_before());
        let mut session = Session::new(model, corpus, settings);
        let files = Files::new(cx.scratch());
        run::resume(&mut session, &files, cx)?;
        run::run(params, plan, &mut session, &validation, recall.as_ref(), &files, cx)?;

        let points = session.progress.points.iter().map(|p| CurvePoint {
            step: p.step,
            epoch: p.epoch,
            loss: p.loss,
            lr: Some(p.learning_rate),
            valid_loss: p.valid_loss,
            metric: p.metric,
        });
        jsonl::write(cx.output("curve")?, points)?;
        let facts = facts(params, &session, counts.facts());
        let model = session.into_model();
        write(params, &model, &layout, base.as_deref(), facts, cx.output("checkpoint")?)
    }
}

/// What is wrong where there is no model to start from, and what to do.
fn without_model(method: Method) -> (String, &'static str) {
    let help = "set `model: Qwen/Qwen3-0.6B` (or another repository of the hub, or a folder) under `with`, or connect \
                the input `model`: the `checkpoint` of another `train`";
    (format!("`method: {}` needs a model to start from", method.name()), help)
}

/// The model to train: new, or read from `base`.
fn begin(
    params: &Params,
    layout: &Layout,
    base: Option<&Path>,
    longest: usize,
    cx: &mut StageContext,
) -> Result<Model, StageError> {
    let tokenizer = layout.tokenizer();
    let (config, weights) = match base {
        None => {
            let mut config = params.architecture.config(tokenizer.size(), params.max_length);
            special_tokens(&mut config, tokenizer);
            memory::check(params, &config, longest, cx)?;
            let weights = init::random(&config, params.seed);
            (config, weights)
        }
        Some(folder) => {
            let config = Config::load(folder)?;
            check_tokenizer(tokenizer, &config, folder, cx)?;
            if params.max_length > config.max_positions {
                return Err(StageError::params(format!(
                    "`max_length` is {}, and the model has {} positions",
                    params.max_length, config.max_positions
                ))
                .help(format!("set `max_length: {}` or less", config.max_positions)));
            }
            memory::check(params, &config, longest, cx)?;
            init::load(folder)?
        }
    };
    let mut model = Model::new(config, weights, params.max_length);
    model.recompute(params.gradient_checkpointing);
    if params.method == Method::Lora {
        model.adapt(&params.lora_options());
    }
    let (all, trained) = (model.weights.len(), model.trainable().len());
    cx.info(format!("{all} weights, {trained} numbers trained, {} tokens", model.config().vocab_size));
    Ok(model)
}

/// Whether a tokenizer can be that of the model that it lies beside.
///
/// # Errors
/// It has more tokens than the model, or lacks the one that ends the model's texts.
fn check_tokenizer(
    tokenizer: &Tokenizer,
    config: &Config,
    folder: &Path,
    cx: &mut StageContext,
) -> Result<(), StageError> {
    let (tokens, rows) = (tokenizer.size(), config.vocab_size);
    let wrong = |what: String| {
        let error = StageError::input(folder.join("tokenizer.json"), what);
        Err(error.help("tokenizer.json and config.json are of different models"))
    };
    if tokens > rows {
        return wrong(format!("has {tokens} tokens, and the model {rows}"));
    }
    if let Some(end) = config.eos_tokens.iter().find(|end| **end as usize >= tokens) {
        return wrong(format!("has {tokens} tokens, and the model's texts end with token {end}"));
    }
    // Models leave some rows unused, to have a round number of them.
    if tokens + tokens / 10 + 128 < rows {
        cx.warn(format!("tokenizer.json has {tokens} tokens and the model {rows}: they may be of different models"));
    }
    Ok(())
}

/// Names the special tokens of a tokenizer that was made here in the configuration of its model.
fn special_tokens(config: &mut Config, tokenizer: &Tokenizer) {
    let id = |token: &str| tokenizer.id(token);
    let (bos, eos, pad) = match tokenizer.is_of_words() {
        true => (special::WORDS_START, special::WORDS_END, special::WORDS_PAD),
        false => (special::TEXT_START, special::TURN_END, special::TEXT_START),
    };
    (config.bos_token, config.eos_tokens, config.pad_token) = (id(bos), id(eos).into_iter().collect(), id(pad));
}

/// What `grlm.json` tells people about the run.
fn facts<'a>(
    params: &Params,
    session: &Session,
    counts: impl IntoIterator<Item = (&'a str, u64)>,
) -> Map<String, Value> {
    let mut facts: Map<String, Value> = counts.into_iter().map(|(k, v)| (k.to_owned(), v.into())).collect();
    let progress = &session.progress;
    facts.insert("steps".into(), progress.step.into());
    facts.insert("epochs".into(), json!(session.epoch()));
    facts.insert("seed".into(), params.seed.into());
    facts.insert("normalize".into(), json!(params.normalize));
    if let Some(point) = progress.points.last() {
        facts.insert("loss".into(), json!(point.loss));
    }
    if let Some(best) = progress.best {
        facts.insert("best_step".into(), best.step.into());
        let at = progress.points.iter().find(|p| p.step == best.step);
        for (name, value) in
            [("valid_loss", at.and_then(|p| p.valid_loss)), ("valid_recall@10", at.and_then(|p| p.metric))]
        {
            if let Some(value) = value {
                facts.insert(name.into(), json!(value));
            }
        }
    }
    facts
}

/// Writes the checkpoint folder.
fn write(
    params: &Params,
    model: &Model,
    layout: &Layout,
    base: Option<&Path>,
    facts: Map<String, Value>,
    folder: &Path,
) -> Result<(), StageError> {
    fs::create_dir_all(folder).map_err(|e| StageError::io("create", folder, e))?;
    export::write(folder, model.config(), &model.merged(), params.stored())?;
    match base {
        Some(base) => Tokenizer::copy(base, folder)?,
        None => layout.tokenizer().save(folder)?,
    }
    let settings = layout.settings();
    CheckpointInfo {
        version: CHECKPOINT_VERSION,
        format: settings.format,
        tokens: settings.tokens,
        template: settings.template,
        bos: settings.bos.clone(),
        instruction: settings.instruction.clone(),
        max_length: settings.max_length,
        method: params.method.name().into(),
        trained_from: facts,
    }
    .write(folder)
}
