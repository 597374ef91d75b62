// The dashboard as TypeScript checks it: DASHBOARD is replaced by its JSON, GRAFANA by the package of a version.
//
// The types of `@grafana/schema` use enums where JSON has their values, so `Plain` takes enums for their values; all
// else is as strict as an object literal can be: unknown names are refused. What the Prometheus data source reads
// of an annotation is in no type of that package.
import type { AnnotationQuery, Dashboard, FieldConfigSource, GraphFieldConfig, Panel, RowPanel } from "GRAFANA";
import type { Options as BarGauge } from "GRAFANA/dist/esm/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen";
import type { Options as Stat } from "GRAFANA/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type {
  FieldConfig as TimelineFields,
  Options as Timeline,
} from "GRAFANA/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen";
import type { Options as Lines } from "GRAFANA/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";

type Plain<T> = T extends string
  ? `${T}`
  : T extends (infer Item)[]
    ? Plain<Item>[]
    : T extends object
      ? { [Key in keyof T]: Plain<T[Key]> }
      : T;

interface PrometheusQuery {
  refId: string;
  expr: string;
  datasource: { type: "prometheus"; uid: string };
  legendFormat?: string;
  instant?: boolean;
  range?: boolean;
  interval?: string;
}

interface Event extends Omit<AnnotationQuery, "target"> {
  expr: string;
  step: string;
  titleFormat: string;
  textFormat: string;
  tagKeys: string;
  target: PrometheusQuery;
}

interface Of<Type extends string, Options, Fields = Record<string, never>>
  extends Omit<Panel, "fieldConfig" | "options" | "targets" | "type"> {
  type: Type;
  options: Partial<Options>;
  fieldConfig: Omit<FieldConfigSource, "defaults"> & {
    defaults: Omit<FieldConfigSource["defaults"], "custom"> & { custom?: Partial<Fields> };
  };
  targets: PrometheusQuery[];
}

interface Whole extends Omit<Dashboard, "annotations" | "panels"> {
  annotations: { list: Event[] };
  panels: (
    | RowPanel
    | Of<"bargauge", BarGauge>
    | Of<"stat", Stat>
    | Of<"state-timeline", Timeline, TimelineFields>
    | Of<"timeseries", Lines, GraphFieldConfig>
  )[];
}

export const dashboard: Plain<Whole> = DASHBOARD;
