"""
Is each number that we publish held by a test? Wrong ones are planted, one after the other, and a test must fail.

    python tests/mutants.py [--only WORD] [--list]        some minutes on one core; exit 1 if one survived, or no longer applies

MUTANTS below is the table: by file, what stands there exactly once, what is planted instead, the test that must see it, and what
a reader would be told without that test. Each would still look plausible in a table or a log. Whoever adds a number to a report
adds a line here. tests/test_report.py sees to it that all still apply.
"""
import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 120  # seconds of one test
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "results", "assets", "out", "data")

# {file: [(old, new, test as FILE::NAME without "test_", what it would tell)]}
MUTANTS = {
    "cost.py": [
        ("return 6 * used", "return 4 * used", "report::flops_are_those_counted_by_hand", "backward taken for half its FLOPs: MFU two thirds"),
        ("+ 12 * config.n_layer", "+ 24 * config.n_layer", "report::flops_are_those_counted_by_hand", "attention that is not causal: MFU too high in long contexts"),
        ("(0 if config.tied else config.vocab_size * config.width)", "0", "report::flops_are_those_counted_by_hand", "the embedding's look-up counted as a product: MFU too high in small models"),
        ("attention += (C + 1) * kv", "attention += C * kv", "cost::parameters_are_the_models", "parameters without the gates' biases"),
        ('"H200": 989e12', '"H200": 1979e12', "cost::peak_of_a_device", "the data sheet's peak with sparsity: MFU halved"),
        ("EXPECTED_MFU * peak * world", "EXPECTED_MFU * peak", "report::a_run_is_told_by_figures_worked_by_hand", "hours told for one GPU"),
        ("flops = args.batch * args.context_len, args.batch // world // plan.device_batch, sum(of_pass.values())",
         "flops = args.batch * args.context_len, args.batch // world // plan.device_batch, max(of_pass.values())",
         "report::a_run_is_told_by_figures_worked_by_hand", "hours and FLOPs without ARL's pass"),
        ("args.batch // world // plan.device_batch", "args.batch // plan.device_batch", "report::a_run_is_told_by_figures_worked_by_hand", "parts of a batch told for one GPU"),
        ("{args.steps * flops:.2e} in all", "{args.steps * flops / 2:.2e} in all", "report::a_run_is_told_by_figures_worked_by_hand", "half the FLOPs of a run"),
        ("number / 1000 ** power", "number / 1024 ** power", "report::a_run_is_told_by_figures_worked_by_hand", "thousands of 1,024 tokens"),
        ('f"{n / 1e9:.1f} GB"', 'f"{n / 2**30:.1f} GB"', "report::a_run_is_told_by_figures_worked_by_hand", "GiB called GB"),
        ("USABLE = 0.90", "USABLE = 1.0", "report::room_is_nine_tenths_of_what_is_there", "a plan that fits and then does not"),
        ('/ processes_here', '/ 1', "report::room_is_nine_tenths_of_what_is_there", "each process takes the machine's memory for its own"),
        ("max(config.n_layer - recompute, 1)", "max(config.n_layer - recompute, 0)", "report::bytes_are_those_counted_by_hand", "predicted memory without the layer that backward is at"),
        ("+ recompute * anew)", ")", "report::bytes_are_those_counted_by_hand", "predicted memory without the inputs of layers computed anew"),
        ("(4 if small else 0)", "0", "report::bytes_are_those_counted_by_hand", "predicted memory of small models too low"),
        ("4 + 2 * width) * head", "2 * width) * head", "report::bytes_are_those_counted_by_hand", "predicted memory without the head's gradient in fp32"),
        ("3 * width * tokens * C", "2 * width * tokens * C", "report::bytes_are_those_counted_by_hand", "predicted memory of the loss too low"),
        ("4 * total / world - activations - loss", "4 * total / world - activations", "report::bytes_are_those_counted_by_hand", "gradients predicted beside a loss that is gone by then"),
        ("        gradients = 4 * total / world\n", "        gradients = 4 * total\n", "report::bytes_are_those_counted_by_hand", "gradients that are not spread over the GPUs"),
        ('"weights and moments": 12 * total', '"weights and moments": 16 * total', "report::bytes_are_those_counted_by_hand", "gradients counted twice"),
        ("+ (2 if memory else 0) + (1 if normed and memory else 0)", "+ (2 if memory else 0)", "report::bytes_are_those_counted_by_hand", "predicted memory of a model with memory and QK-norm too low"),
        ("* config.n_kv_head / config.n_head", "", "report::bytes_are_those_counted_by_hand", "grouped-query models predicted as large as others"),
    ],
    "samples.py": [
        ("drills = self.args, 1.0 if index < self.only_drills else self.later_drills", "drills = self.args, 0.0", "report::samples_are_of_the_kinds_that_the_flags_say", "a recipe with drills trains without any"),
        ("0.3 if only_drills else 0.0", "0.0", "report::samples_are_of_the_kinds_that_the_flags_say", "drills end after the first third"),
        ("0.3 if only_drills else 0.0", "0.3", "report::samples_are_of_the_kinds_that_the_flags_say", "--drills=0 trains on drills"),
        ("int(args.drills * args.steps) * args.batch", "int(args.drills * args.steps)", "report::samples_are_of_the_kinds_that_the_flags_say", "drills for a share of the samples of one step"),
        ("index < self.only_drills", "index <= self.only_drills", "report::samples_are_of_the_kinds_that_the_flags_say", "one drill more: another model under the same flags"),
        ('f"val-{seed}")', "seed)", "report::training_validation_and_test_share_no_needle", "validation by training samples: 100 % right"),
        ('f"{args.recipe}-{args.seed}" if args.init else args.seed', "args.seed", "report::training_validation_and_test_share_no_needle", "fine-tuning meets the needles of the pretraining"),
        ('"other_weight": 0.0', '"other_weight": args.other_weight', "report::only_answers_count_in_validation_and_the_rest_as_told_in_training", "validation of all tokens where --other_weight=1"),
        ("self.tasks = args.tasks or fitting", "self.tasks = fitting", "report::tasks_protocol_and_haystack_are_those_of_the_flags", "trained on other tasks than --tasks says"),
        ("self.tasks, args.many, self.haystack,", "self.tasks, args.many, None,", "report::tasks_protocol_and_haystack_are_those_of_the_flags", "--haystack that is not read"),
        ("self.tasks, args.many, self.haystack,", "self.tasks, 0.5, self.haystack,", "report::samples_are_of_the_kinds_that_the_flags_say", "--many that is not heard"),
        ("args.other_weight, args.protocol,", "args.other_weight, \"base\",", "report::tasks_protocol_and_haystack_are_those_of_the_flags", "trained in the other protocol than evaluated"),
        ('Text(args, tokenizer, "val")', 'Text(args, tokenizer, "train")', "report::text_is_validated_on_windows_that_are_not_trained_on", "validation loss of text that was trained on"),
        ("        one[0] = 0\n", "", "report::text_is_validated_on_windows_that_are_not_trained_on", "a token that is no target in the count of weights"),
        ("step * self.batch + self.rank * self.per_process", "step * self.batch", "report::each_process_takes_its_part_of_each_batch", "every GPU trains on the same part of a batch"),
        ("args.batch // processes.world", "args.batch", "report::each_process_takes_its_part_of_each_batch", "a batch larger than told"),
        ("range(done, args.steps)", "range(args.steps)", "report::each_process_takes_its_part_of_each_batch", "a resumed run sees its first samples again"),
        ("        parts.append(repr(dataset.shards.starts).encode())\n", "        pass\n", "report::a_run_is_known_by_its_samples", "a run that goes on although a shard is gone"),
        ("for part in dataset[0]]", "for part in dataset[0][:1]]", "report::a_run_is_known_by_its_samples", "a run that goes on with other weights of its tokens"),
    ],
    "record.py": [
        ('entry["mfu"] = round(sum(self.of_pass.values())', 'entry["mfu"] = round(2 * sum(self.of_pass.values())', "report::a_line_of_the_log_by_hand", "MFU doubled in the log"),
        ('entry["mfu"] = round(sum(', 'entry["mfu"] = round(max(', "report::a_line_of_the_log_by_hand", "MFU of the dense pass's FLOPs by the seconds of both"),
        ("seconds = seconds_between(marks[0], marks[-1])", "seconds = seconds_between(marks[-2], marks[-1])", "report::a_line_of_the_log_by_hand", "tokens a second and MFU without the time of ARL's pass"),
        ('round(self.tokens / seconds)', 'round(len(self.of_pass) * self.tokens / seconds)', "report::a_line_of_the_log_by_hand", "tokens a second that count each token for each pass"),
        ('values[:n], values[n:], marks, marks[1:]', 'values[n:], values[:n], marks, marks[1:]', "report::a_line_of_the_log_by_hand", "norms told as losses"),
        ("zip(self.of_pass, values[:n]", "zip(reversed(self.of_pass), values[:n]", "report::a_line_of_the_log_by_hand", "ARL's loss told as the dense one"),
        ('what if name == "dense" and what != "seconds"', 'what if name != "joint" and what != "seconds"', "report::a_line_of_the_log_by_hand", "the last pass's numbers under both names"),
        ('entry["step"] * self.tokens', '(entry["step"] - 1) * self.tokens', "report::a_line_of_the_log_by_hand", "tokens seen, a step behind"),
        ("return number if math.isfinite(number) else None", "return number if math.isfinite(number) else 0.0", "report::skipped_passes_are_counted_and_three_steps_in_a_row_end_the_run", "a loss of 0 where there was none"),
        ("for norm in values[n:])\n", "for norm in values[:n])\n", "report::skipped_passes_are_counted_and_three_steps_in_a_row_end_the_run", "passes skipped for their norm not counted"),
        ("bad = sum(not", "bad = any(not", "report::skipped_passes_are_counted_and_three_steps_in_a_row_end_the_run", "steps counted instead of passes"),
        ("self.in_a_row + 1 if bad else 0", "self.in_a_row + bad", "report::skipped_passes_are_counted_and_three_steps_in_a_row_end_the_run", "a long run ended by its third bad step"),
        ('self.hopeless = before["skipped"], 0, None', 'self.hopeless = 0, 0, None', "report::skipped_passes_are_counted_and_three_steps_in_a_row_end_the_run", "skipped passes forgotten over a resume"),
        ('time.time() - before["seconds"]', "time.time()", "report::the_log_goes_on_behind_the_checkpoint", "hours of training since the last resume alone"),
        ("splitlines(keepends=True)[:done]", "splitlines(keepends=True)", "report::the_log_goes_on_behind_the_checkpoint", "steps that were lost, twice in the log"),
        ("statistics.median(step_seconds)", "min(step_seconds)", "report::a_record_by_hand", "tokens a second of the fastest step"),
        ("statistics.median(step_seconds)", "statistics.fmean(step_seconds)", "report::a_record_by_hand", "a speed with the compilation in it"),
        ("round(sum(log.of_pass.values()) / seconds / log.peak, 4)", "round(2 * sum(log.of_pass.values()) / seconds / log.peak, 4)", "report::a_record_by_hand", "MFU doubled in train.json and the summary"),
        ('"processes": processes.world', '"processes": 1', "report::a_record_by_hand", "a run of eight GPUs told as one's"),
        ('"skipped": log.skipped, "first', '"skipped": 0, "first', "report::a_record_by_hand", "no pass skipped, as train.json tells"),
        ("if weight_sum == 0:", "if False:", "report::a_batch_that_counts_nothing_is_no_divergence", "three batches without an answer end a run, told as a divergence"),
        ("start.elapsed_time(end) / 1000", "start.elapsed_time(end) / 500", "report::a_gpus_milliseconds_are_seconds", "half the speed on every GPU"),
        ('MAY_CHANGE = {"resume",', 'MAY_CHANGE = {"lr", "resume",', "report::a_run_does_not_go_on_with_other_flags", "a run at two learning rates, told by the last"),
        ('MAY_CHANGE = {"resume",', 'MAY_CHANGE = {"drills", "resume",', "report::a_run_does_not_go_on_with_other_flags", "a run of two mixtures of samples, told by the last"),
        ("key not in MAY_CHANGE and", "key in MAY_CHANGE and", "report::a_run_does_not_go_on_with_other_flags", "any flag may change over a resume"),
        ('eval_niah.training_record(args.init) if args.init else None', 'None', "train::a_checkpoint_tells_how_it_was_made", "a fine-tuned model without the pretraining's speed and recipe in the summary"),
    ],
    "runs.py": [
        ("return steps == settings.steps", "return steps > 0", "report::a_run_is_finished_after_its_last_step", "a model of half its steps in the table"),
        ("return steps == settings.steps", "return steps < settings.steps", "report::a_run_is_finished_after_its_last_step", "whole runs trained again, half ones asked"),
        ('f"--init={first}", "--arl=0"', 'f"--init={first}", "--arl=64"', "report::two_stages_by_hand", "fine-tuning with ARL"),
        ('[*passed_on(more), f"--seed={seed}"]', '[*passed_on(more), "--seed=0"]', "report::two_stages_by_hand", "three seeds that are one: a spread of nearly nothing"),
        ('f"--init={first}"', 'f"--init={run}"', "report::two_stages_by_hand", "fine-tuning of another model"),
        ("* per_gpu:", "* 1:", "report::each_gpu_has_its_share_of_jobs", "--per_gpu that is not heard"),
        ('{"CUDA_VISIBLE_DEVICES": gpu}', '{"CUDA_VISIBLE_DEVICES": "0"}', "report::each_gpu_has_its_share_of_jobs", "all runs on one GPU: a speed that is none"),
        ("if seed.isdigit():", "if True:", "runs::only_results_are_results", "other methods' files read as more seeds"),
        ("        if theirs != prompts:", "        if theirs.keys() != prompts.keys():", "runs::prompts_of_a_model_not_yet_made_are_those_it_is_asked", "seeds in one mean that were asked other prompts"),
    ],
    "answers.py": [
        ("key=lambda i: len(examples[i].ids)", "key=lambda i: 0", "report::batches_are_of_similar_length", "seconds of padding in the speed told"),
        ("order[start:start + batch] for start in range(0, len(order), batch)", "order[start:start + batch] for start in range(0, len(order) - len(order) % batch, batch)",
         "report::batches_are_of_similar_length", "the last batch is never asked"),
        ("not in there.get((label, task, name), ())", "not in there.get((label, task, next(iter(methods))), ())", "report::what_is_missing_is_asked_and_nothing_else", "answers of one method taken for another's"),
        ("if any(missing.values()):", "if all(missing.values()):", "report::what_is_missing_is_asked_and_nothing_else", "an added method that is never asked"),
        ("if there.keys().isdisjoint(line.examples):", "if True:", "report::lines_are_read_once_each", "hits of a batch counted twice"),
        ("if told != seal_of(content):", "if False:", "report::lines_are_read_once_each", "an answer that a disk or a hand has changed"),
        ("found.setdefault(line[:3], {})", "found.setdefault((line.checkpoint, line.task, line.method.removeprefix('H1 ')), {})", "report::lines_are_read_once_each", "hits taken for answers"),
        ('("samples", "seed", "context_len"', '("samples", "context_len"', "report::answers_of_other_questions_or_models_are_refused", "half a table of another evaluation seed"),
        ('"protocol", "haystack",', '"haystack",', "report::answers_of_other_questions_or_models_are_refused", "half a table in the other protocol"),
        ('"jsonl", "dtype", "kernels")', '"jsonl", "kernels")', "report::answers_of_other_questions_or_models_are_refused", "half a table in bf16"),
        ("= hash_of(files)", "= hash_of(files[:1])", "report::answers_of_other_questions_or_models_are_refused", "half a table of the weights before the last training"),
        ("                digest.update(chunk)\n", "                pass\n", "report::answers_of_other_questions_or_models_are_refused", "a model known by its size alone"),
        ("niah.prompt_hash(e) for task, e in examples[label].items()}", "len(e) for task, e in examples[label].items()}", "report::answers_of_other_questions_or_models_are_refused",
         "half a table of other prompts, of another Python's help pages"),
        ('before["calls"] + [call]', '[call]', "report::answers_of_other_questions_or_models_are_refused", "a report that names its last command alone"),
    ],
    "niah.py": [
        ("in prediction.lower() for answer in answers) / len(answers)", "in prediction.lower() for answer in answers) / max(1, len(answers) - 1)", "report::scores_are_shares_of_the_answers", "three of four answers are all"),
        ("return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)", "return float(any(answer.lower() in prediction.lower() for answer in answers))",
         "report::scores_are_shares_of_the_answers", "one of four answers is all: MV and MQ too high"),
        ("answer.lower() in prediction.lower()", "answer in prediction", "report::scores_are_shares_of_the_answers", "RULER's score with case"),
        ('{piece.strip() for piece in prediction.split(",")}', "set(prediction.split(','))", "report::scores_are_shares_of_the_answers", "the paper's score of base answers near 0"),
        ("start = rng.randrange(len(words)) if start is None else start", "start = 0", "report::training_essays_start_anywhere_and_asked_ones_at_the_first_word", "training on one page of the haystack"),
        ('start = None if split == "train" else 0', "start = None", "report::training_essays_start_anywhere_and_asked_ones_at_the_first_word", "other prompts than RULER's and than those published"),
        ("haystack = Haystack(task, rng, used, words, rng.randrange(len(words)))", "haystack = Haystack(task, rng, used, words, 0)",
         "report::training_essays_start_anywhere_and_asked_ones_at_the_first_word", "samples of many questions from one page of the haystack"),
        ("start, end = rng.randrange(len(words)), rng.randint(1, gap)", "start, end = 0, rng.randint(1, gap)", "report::training_essays_start_anywhere_and_asked_ones_at_the_first_word", "drills between the same words"),
        ("if rng.random() < drills:", "if False:", "report::samples_are_of_the_kinds_that_the_flags_say", "no drills at all"),
        ("elif rng.random() < many:", "elif True:", "report::samples_are_of_the_kinds_that_the_flags_say", "none of the samples that the evaluation asks"),
        ("1 if is_answer else other_weight", "1 if is_answer else 0.1", "report::only_answers_count_in_validation_and_the_rest_as_told_in_training", "--other_weight that is not heard"),
        ("1 if is_answer else other_weight", "1", "report::only_answers_count_in_validation_and_the_rest_as_told_in_training", "validation of all tokens"),
        ("    weights[0] = 0  #", "    pass  #", "report::only_answers_count_in_validation_and_the_rest_as_told_in_training", "a token that is no target in the count of weights"),
        ("(target + [tokenizer.eos_id], True)]", "(target, True), ([tokenizer.eos_id], False)]", "report::only_answers_count_in_validation_and_the_rest_as_told_in_training", "models that do not end their answers"),
        ('random.Random(f"train/{seed}/{index}")', 'random.Random(f"train/{index}")', "report::training_validation_and_test_share_no_needle", "all seeds train on the same samples; validation too"),
        ('random.Random(f"{split}/{seed}/{task}/{index}")', 'random.Random(f"{split}/{task}/{index}")', "report::training_validation_and_test_share_no_needle", "a second evaluation seed that is the first"),
        ('random.Random(f"{split}/{seed}/{task}/{index}")', 'random.Random(f"{seed}/{task}/{index}")', "report::training_validation_and_test_share_no_needle", "a test set that is the validation set"),
        ('"\\0".join(e.prompt for e in examples)', "examples[0].prompt", "report::prompts_are_known_by_all_of_them", "results of 100 samples beside those of 200"),
        ('n_keys=4),\n    "niah_multikey_2"', 'n_keys=2),\n    "niah_multikey_2"', "report::tasks_are_rulers", "MK-1 with one distractor"),
        ('n_values=4),', 'n_values=2),', "report::tasks_are_rulers", "MV of two values: too easy"),
        ("n_keys=4, n_queries=4)", "n_keys=4, n_queries=2)", "report::tasks_are_rulers", "MQ of two questions: too easy"),
        ("round(100 * i / 39) for i in range(40)", "round(50 * i / 39) for i in range(40)", "report::tasks_are_rulers", "needles in the first half alone"),
        ("rng.sample(DEPTHS, len(pairs))", "rng.sample(DEPTHS[-8:], len(pairs))", "niah::depths_are_where_the_needles_are", "needles near the question, in reach of a window"),
        ("[round(depth) for *_, depth in draft.answers]", "[round(100 - depth) for *_, depth in draft.answers]", "niah::depths_are_where_the_needles_are", "accuracy by depth upside down"),
        ("context_len - max_new_tokens)\n", "context_len - 2 * max_new_tokens)\n", "niah::context_is_filled_to_the_limit", "prompts shorter than told: budgets larger than told"),
        ("        if text not in used:\n", "        if True:\n", "report::no_two_keys_or_values_of_a_sample_are_equal", "questions with two right answers"),
        ('return 48 if context_len < 2048 or tokenizer.name == "bytes" else 128', "return 30", "niah::default_new_tokens_hold_every_answer_in_bytes", "answers cut off: UUIDs never found"),
        ('"outputs": e.answers,\n            "others"', '"outputs": e.answers[:1],\n            "others"', "niah::predictions_are_in_the_form_that_rulers_evaluation_reads", "other scores by RULER's own script"),
    ],
    "train.py": [
        ("return (step + 1) / warm", "return step / warm", "report::learning_rate_by_hand", "a first step that learns nothing, and a schedule that is not the official one"),
        ("(1 - floor) * 0.5 * (1 + math.cos(", "(1 - floor) * (math.cos(", "report::learning_rate_by_hand", "a cosine that falls to its end in half the steps, and goes below 0"),
        ("floor = args.min_lr / args.lr", "floor = 0.0", "report::learning_rate_by_hand", "--min_lr that is not heard"),
        ("(step - warm) / max(1, args.steps - warm)", "step / args.steps", "report::learning_rate_by_hand", "a jump after the warm-up"),
        ("scale = learning_rate(step - 1, args)", "scale = learning_rate(step, args)", "report::a_run_by_hand", "a schedule one step ahead"),
        ('group["lr"] = group["peak"] * scale', 'group["lr"] = group["peak"]', "report::a_run_by_hand", "no warm-up and no cosine, though the log tells them"),
        ('group["lr"] = group["peak"] * scale', 'group["lr"] = args.lr * scale', "report::a_run_by_hand", "--memory_lr that is not heard, though the log tells it"),
        ('"lr": args.lr * scale', '"lr": args.lr', "report::a_run_by_hand", "the peak learning rate told as that of the step"),
        ('"memory_lr": args.memory_lr * scale', '"memory_lr": args.lr * scale', "report::a_run_by_hand", "a gate's learning rate that was another"),
        ('"peak": args.memory_lr', '"peak": args.lr', "report::a_run_by_hand", "--memory_lr that is not heard"),
        ("arl_passes(args.arl)[0], T / 2 / args.arl", "arl_passes(args.arl)[0], T / 2", "report::passes_count_what_they_read", "ARL's FLOPs counted as dense: MFU too high"),
        ("min(args.joint, T / 2)", "T / 2", "report::passes_count_what_they_read", "a window's FLOPs counted as dense: MFU too high"),
        ('passes["dense"] = None, T / 2', 'passes["dense"] = None, T', "report::passes_count_what_they_read", "attention that is not causal: MFU too high"),
        ("+ method.local + method.initial)", "+ method.local)", "report::passes_count_what_they_read", "FLOPs of the adaptation without the first entries"),
        ("{name: args.batch * args.context_len *", "{name: args.device_batch * args.context_len *", "report::mfu_is_of_all_gpus", "FLOPs of a part of a batch: MFU too low"),
        ("(norm / clip).clamp_min(1)", "(norm / clip)", "train::update_clips_as_torch_does", "small gradients scaled up to --clip"),
        ("(~norm.isfinite()).float()", "norm.isnan().float()", "report::an_infinite_norm_is_skipped_too", "a pass told as skipped that has changed the weights"),
        ("of_part = loss_of(tokens, weight) / weight_sum", "of_part = loss_of(tokens, weight) / weight[:, 1:].sum() / len(parts)", "report::a_batchs_loss_is_that_of_its_weights",
         "a mean of the parts' means: parts of few answers count as much"),
        ("(of_part * processes.world).backward()", "of_part.backward()", "report::a_batchs_loss_is_that_of_its_weights", "gradients averaged over GPUs: another curve for each number of them"),
        ("        loss += of_part.detach()", "        loss = of_part.detach()", "report::a_batchs_loss_is_that_of_its_weights", "the loss of a batch's last part alone"),
        ("weight_sum = processes.sum(weight[:, 1:].sum())", "weight_sum = processes.sum(weight.sign().sum())", "report::the_first_loss_is_that_of_a_new_model", "a loss per token of any weight: too low"),
        ("for loss_of in losses_of:", "for loss_of in losses_of[::-1]:", "report::the_first_loss_is_that_of_a_new_model", "the dense loss told as ARL's"),
        ("weight = (weight == 1).float()", "weight = (weight > 0).float()", "report::validation_counts_the_answers_alone", "a validation of all that has a weight"),
        ("weight[[i >= samples for i in mine[start:start + args.device_batch]]] = 0", "pass", "report::validation_counts_the_answers_alone", "samples that count on eight GPUs alone"),
        ("mine = range(processes.rank * n, (processes.rank + 1) * n)", "mine = range(n)", "report::validation_counts_the_answers_alone", "each GPU validates by the same samples"),
        ("for start in range(0, n, args.device_batch):", "for start in range(0, n - args.device_batch + 1, args.device_batch):", "report::validation_counts_the_answers_alone", "a validation without its last samples"),
        ("weight[:, 1:].sum().double()])", "weight.sum().double()])", "report::validation_counts_the_answers_alone", "a token that is no target in the mean"),
        ('"val_accuracy": right / count', '"val_accuracy": right / max(1, count - len(mine))', "report::validation_counts_the_answers_alone", "an accuracy that is too high"),
        ('"val_loss": finite(loss / count)', '"val_loss": finite(loss / n)', "report::validation_counts_the_answers_alone", "a loss per sample"),
        ("processes, samples=64)", "processes, samples=8)", "report::a_run_by_hand", "a validation by eight samples: 100 % right by luck"),
        ("layer.median() for layer", "layer.mean() for layer", "report::memory_lengths_are_medians_of_each_layer", "a length that a few endless channels decide"),
        ("validate(model, validation, args, passes", "validate(model, training, args, passes", "report::a_run_by_hand", "validation by what is trained on"),
        ("told[-1][0].update(validate(", "told[0][0].update(validate(", "report::validation_is_told_of_its_step", "a validation in an earlier step's line"),
        ('passes["dense"][0], autocast, processes))', 'None, autocast, processes))', "train::adaptation_trains_and_validates_through_the_pattern", "an adapted model's loss through dense attention"),
        ("(step % every == 0 or last)", "step % every == 0", "report::a_run_by_hand", "a last step without validation"),
        ("waited = round(time.time() - since, 5)", "waited = 0.0", "report::a_steps_seconds_are_its_own", "no time spent on making batches"),
        ("            since = time.time()\n", "            pass\n", "report::a_steps_seconds_are_its_own", "a speed that sinks from step to step"),
        ("record_of(args, step, log, step_seconds,", "record_of(args, step, log, step_seconds[:1],", "report::a_steps_seconds_are_its_own", "a speed of the first step, which compiles"),
        ("peak and peak * world", "peak", "report::mfu_is_of_all_gpus", "MFU of eight GPUs by the peak of one: above 100 %, or 8 % of 1"),
        ("peak * world, args.batch * args.context_len,", "peak * world, args.device_batch * args.context_len,", "report::mfu_is_of_all_gpus", "tokens of a part of a batch"),
        ("statistics.median(step_seconds[-100:])", "statistics.median(step_seconds)", "report::what_is_printed_of_a_step_by_hand", "a speed that is no more"),
        ('left = (args.steps - entry["step"])', "left = args.steps", "report::what_is_printed_of_a_step_by_hand", "time left that never ends"),
        ("{log[0]['arl_loss']:.2f} at the first", "{log[0]['loss']:.2f} at the first", "report::the_lesson_tells_the_numbers_of_its_log", "README's first numbers: the dense loss for ARL's"),
        ("entry['arl_loss'] for entry in log[-10:]", "entry['loss'] for entry in log[-10:]", "report::the_lesson_tells_the_numbers_of_its_log", "README's first numbers: the dense loss for ARL's"),
    ],
    "reproduce.py": [
        ("return {name: statistics.fmean(values) for name, values in cells.items()}", "return {name: max(values) for name, values in cells.items()}", "report_tables::means_are_over_tasks_and_draws", "the best task as the mean"),
        ('(row["ruler"][0])\n    return', '(row["paper"][0])\n    return', "report_tables::means_are_over_tasks_and_draws", "the other score under RULER's name"),
        ('"" if row["random"] is None else BY_CHANCE', '""', "report_tables::means_are_over_tasks_and_draws", "draws by chance among a method's tasks: Quest too low"),
        ("torch.stack(rates).mean(0).sort", "torch.stack(rates).amax(0).sort", "report_tables::hit_rates_are_means_over_tasks_of_each_head_best_first", "H1 as a maximum over tasks"),
        (".sort(descending=True)", ".sort()", "report_tables::hit_rates_are_means_over_tasks_of_each_head_best_first", "hits.png from the worst head"),
        ("return 1 - inside", "return (1 - inside) / 2", "report_tables::p_is_that_of_students_table", "a one-sided p: twice as much in bold"),
        ("angle, odd = math.atan(abs(t) / math.sqrt(df)), df % 2", "angle, odd = math.atan(abs(t) / df), df % 2", "report_tables::p_is_that_of_students_table", "a p that is none"),
        ("(len(ps) - n) * p", "p", "report_tables::holm_by_hand", "no correction for the number of cells: bold by chance"),
        ("least = max(least, min(1.0, (len(ps) - n) * p))", "least = min(1.0, (len(ps) - n) * p)", "report_tables::holm_by_hand", "a worse cell in bold beside a better one that is not"),
        ("[values[seed] - base[seed] for", "[base[seed] - values[seed] for", "report_tables::differences_are_paired_by_seed", "the sign of every gain"),
        ("statistics.stdev(pairs) if len(pairs) > 1", "statistics.pstdev(pairs) if len(pairs) > 1", "report_tables::differences_are_paired_by_seed", "a spread too small by a fifth: bold by chance"),
        ("* math.sqrt(len(pairs)), len(pairs) - 1)", "* math.sqrt(len(pairs)), len(pairs))", "report_tables::differences_are_paired_by_seed", "a degree of freedom too many: bold by chance"),
        ("* math.sqrt(len(pairs)), len(pairs) - 1)", "* len(pairs), len(pairs) - 1)", "report_tables::differences_are_paired_by_seed", "t too large: bold by chance"),
        ("compare(dict(zip(seeds[0], values[method])), dict(zip(seeds[1], base[method])))", "compare(dict(enumerate(values[method])), dict(enumerate(base[method])))",
         "report_tables::differences_are_paired_by_seed", "seeds compared with others"),
        ('against[\'p\']:.2g})" if against["holm"] < 0.05', 'against[\'p\']:.2g})" if against["p"] < 0.05', "report_tables::a_cell_is_mean_and_sample_standard_deviation", "bold of single cells"),
        ("{plus_minus}{statistics.stdev(values):.1f}", "{plus_minus}{statistics.pstdev(values):.1f}", "report_tables::a_cell_is_mean_and_sample_standard_deviation", "± too small by a fifth"),
        ('return f"{statistics.fmean(values):.1f}"', 'return f"{statistics.median(values):.1f}"', "report_tables::a_cell_is_mean_and_sample_standard_deviation", "medians told as means"),
        ("m.endswith(BY_CHANCE) == chance", "m.endswith(BY_CHANCE) >= chance", "report_tables::the_summary_by_hand", "draws by chance in the table of scores"),
        ("{m: 100 * float(eval_niah.best_heads(rates))", "{m: 100 * float(rates.max())", "report_tables::hits_of_many_heads_are_of_the_best_twentieth", "H1 of the best head alone"),
        ('column(of_arm, of["attention"], (list(found[arm]), list(found["attention"])))', 'column(of["attention"], of_arm, (list(found["attention"]), list(found[arm])))',
         "report_tables::the_summary_by_hand", "the sign of every gain"),
        ("against_attention\"][kind][arm].get(method)", "against_attention\"][\"scores\"][arm].get(method)", "report_tables::the_summary_by_hand", "H1's gain that is the scores'"),
        ("cells = [cell(of.get(method)) for of in arms.values()]", "cells = [cell(of.get(method)) for of in reversed(arms.values())]", "report_tables::the_summary_by_hand", "each arm's numbers under another's name"),
        ("{made['seconds'] / 60:.1f}", "{made['seconds'] / 3600:.1f}", "report_tables::the_summary_by_hand", "hours told as minutes"),
        ('return report if report and report["finished"] else None', "return report", "report_tables::results_of_a_folder_are_those_of_finished_runs", "a mean with a run that is not over"),
        ('for key in ("samples", "seed")):', "for key in ()):", "report_tables::results_of_a_folder_are_those_of_finished_runs", "methods that were asked other prompts in one table"),
        (' if row["method"] != "dense"]', "]", "report_tables::results_of_a_folder_are_those_of_finished_runs", "dense of two evaluations in one mean"),
        ("(method, task, None)] for method", "(method, task, 0)] for method", "report_tables::plots_of_the_summary_show_its_numbers", "accuracy.png of draws by chance"),
        ("spread = [statistics.stdev(c) if", "spread = [statistics.pstdev(c) if", "report_tables::plots_of_the_summary_show_its_numbers", "accuracy.png with bars too short"),
        ("[0, 1, 2], [statistics.fmean(c) for c in columns]", "[0, 1, 2], [max(c) for c in columns]", "report_tables::plots_of_the_summary_show_its_numbers", "accuracy.png of the best seeds"),
        ("for report in reports.values()]).mean(0)", "for report in reports.values()]).amax(0)", "report_tables::plots_of_the_summary_show_its_numbers", "hits.png of the best seeds"),
        ("if (cell[\"method\"], cell[\"task\"]", "if (cell[\"method\"], task", "report_tables::plots_of_the_summary_show_its_numbers", "accuracy.png of all tasks in each column"),
        ('{"": [*NINE, "--hits", f"--random={args.random}"], "-more": OTHERS}', '{"": [*NINE, "--hits"], "-more": OTHERS}', "report_tables::each_arm_is_asked_what_the_table_tells", "H2 without draws"),
        ('f"--seed={args.eval_seed}"', '"--seed=0"', "report_tables::each_arm_is_asked_what_the_table_tells", "--eval_seed that is not heard"),
    ],
    "eval_niah.py": [
        ("n, z = len(values), 1.96", "n, z = len(values), 1.645", "report_tables::intervals_are_those_published", "intervals of 90 % called 95 %"),
        ("z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))", "z * math.sqrt(p * (1 - p) / n)", "report_tables::intervals_are_those_published", "100 ± 0 of a few samples"),
        ("p + z * z / (2 * n), z", "p, z", "report_tables::intervals_are_those_published", "an interval around another middle"),
        ("return [p - q, p - q - half", "return [q - p, p - q - half", "report_tables::intervals_of_differences_are_those_published", "the sign of every difference"),
        ("half(p - p_low, q_high - q), p - q + half(p_high - p, q - q_low)", "half(p - p_low, q - q_low), p - q + half(p_high - p, q_high - q)", "report_tables::intervals_of_differences_are_those_published",
         "intervals of differences with the wrong ends"),
        ("x * x - 2 * r * x * y + y * y", "x * x - r * x * y + y * y", "report_tables::intervals_of_differences_are_those_published", "pairs that share half of what they share"),
        ("together = max(0.0, together - 1 / (2 * n))", "pass", "report_tables::intervals_of_differences_are_those_published", "± too small: few prompts that agree prove all"),
        ("r = correlation(a, b) if paired else 0.0", "r = correlation(a, b) if len(a) == len(b) else 0.0", "eval_niah::a_difference_by_hand", "prompts of different tokens paired"),
        ('{"ruler": niah.score_ruler, "paper": niah.score_paper}', '{"ruler": niah.score_paper, "paper": niah.score_ruler}', "report_tables::scores_are_means_over_examples", "each score under the other's name"),
        ("return [niah.score_ruler(text, e.answers) for", "return [niah.score_paper(text, e.answers) for", "report_tables::scores_are_means_over_examples", "differences of the other score"),
        ("found[min(depth // 10, 9)]", "found[min(round(depth / 10), 9)]", "report_tables::answers_are_counted_in_the_tenth_where_their_needle_is", "accuracy by depth, shifted by half a tenth"),
        ("(niah.score_ruler(text, [answer]))", "(niah.score_ruler(text, e.answers))", "report_tables::answers_are_counted_in_the_tenth_where_their_needle_is", "the example's score at each of its needles"),
        ("values = [x for x in values if x is not None]", "values = [x or 0.0 for x in values]", "report_tables::what_nobody_told_is_in_no_mean", "reads too low"),
        ("return cls(*lists, sum(seconds))", "return cls(*lists, max(seconds))", "report_tables::an_answer_its_reads_and_seconds_by_hand", "a task's seconds as those of one answer"),
        ("read.float().mean((0, 2))", "read.float().amax((0, 2))", "report_tables::reads_of_steps_by_hand", "reads of the head and layer that reads most"),
        ("else read[:1])", "else read[:1]) if False else read[:1]", "report_tables::reads_of_steps_by_hand", "reads of the first layer for all"),
        ("read.amax((0, 2))", "read.float().mean((0, 2))", "report_tables::reads_of_steps_by_hand", "a budget that single heads exceed, unnoticed"),
        ("(selected >= 0).sum(-1) for selected", "(selected >= -1).sum(-1) for selected", "report_tables::reads_of_steps_by_hand", "places that hold nothing counted as read"),
        ("float(mean[:n, b].mean()) if n else None", "float(mean[:, b].mean()) if n else None", "report_tables::reads_of_steps_by_hand", "reads of steps after an answer's end"),
        ("int(cache.used.max()) - len(self.mean)", "int(cache.used.min()) - len(self.mean) * 2", "report_tables::reads_of_steps_by_hand", "a budget exceeded after the prompt, unnoticed"),
        ("- (size - 1 - t % size)", "", "report_tables::reads_of_the_prompt_by_hand", "the own block counted whole: MoBA's reads too many"),
        ("* real).sum(1) / real.sum(1))", "* real).mean(1))", "report_tables::reads_of_the_prompt_by_hand", "padding in the mean: MoBA's reads too few"),
        ("for parts in self.mean.values()]).mean(0).tolist()", "for parts in self.mean.values()])[0].tolist()", "report_tables::reads_of_the_prompt_by_hand", "reads of the first layer for all"),
        ("return ((lengths + 1) / 2).tolist()", "return lengths.tolist()", "report_tables::reads_of_the_prompt_by_hand", "dense attention that reads the future"),
        ("row[:row.index(eos_id)] if eos_id in row else row", "row", "report_tables::an_answer_its_reads_and_seconds_by_hand", "text behind the end in the paper's score"),
        ("[min(len(row), n_new - 1) for row in new]", "[n_new - 1 for row in new]", "report_tables::an_answer_its_reads_and_seconds_by_hand", "reads of steps after an answer's end"),
        ("(prefill_seconds + time.time() - started) / len(examples)", "(time.time() - started) / len(examples)", "report_tables::an_answer_its_reads_and_seconds_by_hand", "seconds without the prefill: SnapKV too fast"),
        ("(prefill_seconds + time.time() - started) / len(examples)", "prefill_seconds + time.time() - started", "report_tables::an_answer_its_reads_and_seconds_by_hand", "a batch's seconds for each of its rows"),
        ("for i, of_row in zip(rows, of_rows):\n                told[method][i] = of_row", "for i, of_row in zip(sorted(rows), of_rows):\n                told[method][i] = of_row",
         "eval_niah::answers_do_not_depend_on_order_or_batch", "answers given to their neighbours"),
        ("hit[b].get(s.answer, True) & read[:, b]", "hit[b].get(s.answer, False) | read[:, b]", "report_tables::a_hit_is_a_place_read_at_every_step_of_an_answer", "H1 of any token instead of all"),
        ("for j in range(1, target.shape[1]):\n        model.step(target[:, j - 1]", "for j in range(1, target.shape[1]):\n        model.step(target[:, j]", "report_tables::a_hit_is_a_place_read_at_every_step_of_an_answer",
         "H1 of the step after"),
        ("source = [found[j] if j < len(found)", "source = [found[j - 1] if j <= len(found)", "report_tables::a_hit_is_a_place_read_at_every_step_of_an_answer", "H1 of the place before"),
        ("(positions < high[:, None, None])).any(-1)", "(positions <= high[:, None, None])).any(-1)", "report_tables::a_hit_is_a_place_read_at_every_step_of_an_answer", "H1 of places beside the answer's"),
        ("(positions < high[:, None, None])).any(-1)", "(positions < high[:, None, None])).any(-1).any(-1, keepdim=True)", "report_tables::a_hit_is_a_place_read_at_every_step_of_an_answer", "H1 of any head for each"),
        (".masked_fill(slot >= cache.used[:, None, None], -1)", "", "report_tables::what_snapkv_has_left_is_what_was_read", "H1 of slots that hold nothing"),
        (".topk(max(1, round(0.05 * rates.numel()))).values.mean()", ".max()", "report_tables::best_heads_are_the_mean_of_the_best_twentieth", "H1 as a maximum instead of a mean"),
        ("round(0.05 * rates.numel())", "round(0.5 * rates.numel())", "report_tables::best_heads_are_the_mean_of_the_best_twentieth", "H1 of half the heads"),
        ("halves = [(high - low) / 2 for", "halves = [(high - low) for", "report_tables::table_by_hand", "± twice as wide"),
        ("math.sqrt(sum(h * h for h in halves)) / len(cells)", "sum(halves) / len(cells)", "report_tables::table_by_hand", "± of a mean as of one task"),
        ("statistics.fmean(mean for mean, *_ in cells)", "max(mean for mean, *_ in cells)", "report_tables::table_by_hand", "the best task as the mean"),
        ('if row["random"] is None:\n            found', 'if True:\n            found', "report_tables::table_by_hand", "draws by chance among a method's tasks"),
        ('([row[score] for row in rows]) for score in ("ruler", "paper"))', '([row[score] for row in rows]) for score in ("ruler", "ruler"))', "report_tables::table_by_hand", "RULER's score under the paper's name"),
        ("100 * best_heads(torch.tensor([row[\"hits\"] for row in rows]).mean(0))", "100 * best_heads(torch.tensor([row[\"hits\"] for row in rows]).amax(0))", "report_tables::table_by_hand", "H1 of the best task"),
        ('prompt_read, read = mean(row["prompt_read"] for row in rows), mean(row["read"] for row in rows)', 'read, prompt_read = mean(row["prompt_read"] for row in rows), mean(row["read"] for row in rows)',
         "report_tables::table_by_hand", "reads of the prompt under the answer's name"),
        ("difference(by_prompt[first, method, row[\"task\"]], by_prompt[other, method, row[\"task\"]], same)", "difference(by_prompt[other, method, row[\"task\"]], by_prompt[first, method, row[\"task\"]], same)",
         "report_tables::table_by_hand", "the sign of every difference"),
        ('f"{gain:+8.1f} ±{half:4.1f}"', 'f"{gain:+8.1f} ±{0:4.1f}"', "report_tables::table_by_hand", "± 0 of a mean difference"),
        ("statistics.stdev(x):.1f}\" if len(x) > 1", "statistics.pstdev(x):.1f}\" if len(x) > 1", "report_tables::table_of_draws_by_hand", "H2's spread too small"),
        ("statistics.stdev(x):.1f}\" if len(x) > 1", "0:.1f}\" if len(x) > 1", "report_tables::table_of_draws_by_hand", "H2's spread 0"),
        ("statistics.fmean(x):.1f}{spread(x)}", "max(x):.1f}{spread(x)}", "report_tables::table_of_draws_by_hand", "H2's best draw"),
        ('if row["random"] is not None:', "if True:", "report_tables::table_of_draws_by_hand", "the chosen among the draws by chance"),
        ("sum(n * p for n, p in cells) / sum(n for n, _ in cells)", "sum(p for n, p in cells) / len(cells)", "report_tables::the_plot_shows_the_tables_numbers", "depths weighted alike though their answers are not as many"),
        ("found[checkpoint, methods[budgets[0]]], f\"C{i}\"", "found[checkpoint, methods[budgets[-1]]], f\"C{i}\"", "report_tables::the_plot_shows_the_tables_numbers", "accuracy by depth at the largest budget, called the least"),
        ('range(5, 100, 10), depths(dense)', 'range(5, 100, 10), depths(least)', "report_tables::the_plot_shows_the_tables_numbers", "a dense line that is none"),
        ("above.axhline(mean_of_tasks([row[\"ruler\"] for row in dense])[0]", "above.axhline(mean_of_tasks([row[\"paper\"] for row in dense])[0]", "report_tables::the_plot_shows_the_tables_numbers", "a dense line of the other score"),
        ("min(64, max(8, context_len // 64))", "min(64, max(8, context_len // 32))", "report_tables::blocks_and_windows_are_a_64th_of_the_context", "blocks larger than the paper's"),
        ("niah.make_example(task, args.context_len, tokenizer, args.seed, index, args.protocol, haystack,", "niah.make_example(task, args.context_len, tokenizer, 0, index, args.protocol, haystack,",
         "report_tables::examples_are_those_of_the_flags", "--seed that is not heard"),
        ("niah.make_example(task, args.context_len, tokenizer, args.seed, index, args.protocol, haystack,", "niah.make_example(task, args.context_len, tokenizer, args.seed, index, \"base\", haystack,",
         "report_tables::examples_are_those_of_the_flags", "--protocol that is not heard"),
        ('getattr(m, "budget", 0) * 4 == args.context_len', 'getattr(m, "budget", 0) * 8 == args.context_len', "eval_niah::results_hold_what_a_reader_needs_to_repeat_them", "H2 of another budget than it says"),
        ("sparse.randomized(m, seed): methods[m]", "sparse.randomized(m, 0): methods[m]", "eval_niah::results_hold_what_a_reader_needs_to_repeat_them", "one draw for all: H2 without a spread"),
        ("told._replace(seconds=told.seconds * size / len(rows))", "told", "report_tables::answers_and_seconds_go_to_their_examples", "seconds of rows that fill a batch up, lost"),
        ("for i, told in zip(rows, of_rows)}", "for i, told in zip(reversed(rows), of_rows)}", "report_tables::answers_and_seconds_go_to_their_examples", "an answer given to its neighbour"),
        ("if i in some for heads in of_row.values()]", "for heads in of_row.values()]", "eval_niah::hits_of_what_is_missing_alone_are_counted", "H1 of rows that were told before, twice"),
        ('/ sum(b["answers"] for b in batches)', '/ (len(batches) * batches[0]["answers"])', "report_tables::results_by_hand", "H1 of batches as if all were of one size"),
        ("if i == line.examples[0]]", "]", "report_tables::results_by_hand", "H1 of a batch once for each of its examples"),
        ("by_prompt[label, text, task] = ruler_scores(outcome.texts, of_task)", "by_prompt[label, text, task] = [0.0 for _ in of_task]", "report_tables::results_by_hand", "no model differs from another"),
        ("if getattr(method, \"random\", None) is None:", "if True:", "report_tables::results_by_hand", "differences of a method's draws by chance"),
        ("None if read is None else read / args.context_len", "None if read is None else read / max(len(e.ids) for e in of_task)", "report_tables::results_by_hand", "shares of another length than the budgets'"),
        ('"prompt_read_share": share(prompt_read)', '"prompt_read_share": share(read)', "report_tables::results_by_hand", "a prompt's reads that are the answer's"),
        ('"hits": None if rates is None else rates.tolist(), "seconds": outcome.seconds', '"hits": None if rates is None else rates.tolist(), "seconds": outcome.seconds / len(of_task)',
         "report_tables::results_by_hand", "seconds of one answer told as a task's"),
        ('"n": len(of_task)', '"n": args.context_len', "report_tables::results_by_hand", "a number of samples that is none"),
        ("speed['answers'] / speed['seconds']", "speed['answers'] / (speed['seconds'] + speed['seconds_of_loading'])", "report_tables::results_by_hand", "answers a second with the loading in it"),
        ("answering, loading = map(max, spent)", "answering, loading = map(min, spent)", "report_tables::speed_is_of_the_last_process_to_finish", "answers a second of the fastest GPU"),
        ('speed = {"answers": count(left)', 'speed = {"answers": total', "report_tables::speed_is_of_the_last_process_to_finish", "answers a second with those of an earlier run"),
        ("loading + loaded - started, answering + time.time() - loaded", "loading + loaded - started, answering + time.time() - started", "report_tables::speed_is_of_the_last_process_to_finish", "seconds of answering with the loading in them"),
        ("mine, count = left[ranks.rank::ranks.n]", "mine, count = left[::ranks.n]", "eval_niah::two_processes_answer_like_one_and_go_on_where_one_was_stopped", "batches that no process takes"),
        ('+ ("+dirty" if git("status"', '+ ("" if git("status"', "report_tables::a_changed_tree_is_told", "a commit named that did not make the numbers"),
        ('args.protocol = args.protocol or trained_with(args.ckpt[0]).get("protocol", "base")', 'args.protocol = args.protocol or "base"', "report_tables::what_is_not_given_is_the_models", "a fine-tuned model asked in the other protocol"),
        ("args.context_len = args.context_len or settings[args.ckpt[0]][\"context_len\"]", "args.context_len = args.context_len or 4096", "report_tables::what_is_not_given_is_the_models", "a model asked beyond its context"),
        ('args.tasks = args.tasks or trained_with(args.ckpt[0]).get("tasks")', "args.tasks = args.tasks or None", "report_tables::what_is_not_given_is_the_models", "a model asked tasks that it never saw"),
    ],
    "sample.py": [
        ("torch.stack(by_step.mean).mean()", "torch.stack(by_step.mean).max()", "report_tables::what_sample_prints_by_hand", "the most that a step read"),
        ("({len(new)} tokens after {len(ids)}", "({len(ids)} tokens after {len(new)}", "report_tables::what_sample_prints_by_hand", "tokens of the answer and of the prompt exchanged"),
        ("PromptReads(sparse.phases(method).prefill_by), Reads()", "PromptReads(sparse.Dense()), Reads()", "sample::what_moba_reads_in_prefill_is_told", "MoBA's prefill told as dense"),
    ],
}


def stale(file, old, test, root=ROOT):
    """Why a line of the table no longer applies, None if it does."""
    times = (root / file).read_text(encoding="utf-8").count(old)
    if times != 1:
        return f"what it changes is there {times} times"
    module, _, name = test.partition("::")
    tests = root / "tests" / f"test_{module}.py"
    if not tests.exists() or f"\ndef test_{name}(" not in tests.read_text(encoding="utf-8"):
        return f"there is no test {test}"


def load():
    """All modules of others that the tests take, so that no fork has to load them."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    sys.path[:1] = [str(ROOT), str(ROOT / "tests")]
    import conftest  # noqa: F401
    import reproduce  # noqa: F401
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent in (ROOT, ROOT / "tests") and name != "__main__":
            del sys.modules[name]


def fails(tree, tests):
    """
    Whether one of these tests fails in a tree, or hangs. In a fork of this process, which has loaded all but our own modules:
    that takes little longer than the test itself.
    """
    def in_tree():
        out = os.open(tree / "told", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        os.chdir(tree)
        sys.path[:2] = []  # see load
        sys.dont_write_bytecode = True  # a module's cache knows no change within a second
        import pytest
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(f"tests/test_{test.replace('::', '.py::test_')}" for test in tests)])
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=in_tree)
    process.start()
    process.join(TIMEOUT * len(tests))
    if process.is_alive():
        process.kill()
        return True
    if process.exitcode not in (0, 1):
        raise ValueError(f"pytest ended with {process.exitcode}:\n{(tree / 'told').read_text()[-3000:]}")
    return process.exitcode == 1


def main():
    parser = argparse.ArgumentParser(description="Plant wrong numbers, and see that a test fails.")
    parser.add_argument("--only", default="", metavar="WORD", help="those whose line of the table holds it")
    parser.add_argument("--list", action="store_true", help="print them, and plant none")
    args = parser.parse_args()
    chosen = [(file, *mutant) for file, mutants in MUTANTS.items() for mutant in mutants if args.only in f"{file} {mutant}"]
    if args.list:
        for file, old, new, test, tells in chosen:
            print(f"{file}: {tells}\n    - {old}\n    + {new}\n    {test}")
        return
    load()
    began, ended = time.time(), {"killed": 0, "SURVIVED": 0, "STALE": 0}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        apply = [mutant for mutant in chosen if not stale(*mutant[:2], mutant[3], tree)]
        if fails(tree, sorted({test for *_, test, _ in apply})):
            sys.exit(f"tests fail before anything is planted:\n{(tree / 'told').read_text()[-3000:]}")
        for number, (file, old, new, test, tells) in enumerate(chosen, start=1):
            why = stale(file, old, test, tree)
            how = "STALE" if why else None
            if not how:
                source = (tree / file).read_text(encoding="utf-8")
                (tree / file).write_text(source.replace(old, new), encoding="utf-8")
                how = "killed" if fails(tree, [test]) else "SURVIVED"
                (tree / file).write_text(source, encoding="utf-8")
            ended[how] += 1
            print(f"{number:>3} of {len(chosen)}  {how:8}  {file}: {tells} ({why or test})", flush=True)
    print(f"{', '.join(f'{n} {how}' for how, n in ended.items())}, in {(time.time() - began) / 60:.1f} minutes")
    sys.exit(ended["killed"] < len(chosen))


if __name__ == "__main__":
    main()
